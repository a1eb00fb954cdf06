"""`python -m umbrella_jax.cli`, where the command itself is not on the PATH."""

import sys

from umbrella_jax.cli import main

sys.exit(main())
