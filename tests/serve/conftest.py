"""The server that tests of the API and of the page share."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.helpers.served import Served
from tests.helpers.small_run import make_world


@pytest.fixture(scope="package")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with ExitStack() as stack:
        yield Served(make_world(tmp_path_factory.mktemp("served")), stack)
