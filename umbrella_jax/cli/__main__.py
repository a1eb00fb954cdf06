"""`python -m umbrella_jax.cli`, for when the command is not on the PATH."""

import sys

from umbrella_jax.cli import main

sys.exit(main())
