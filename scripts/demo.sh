#!/usr/bin/env bash
# Makes .venv if it is missing, installs the project, and goes the whole path on real scans.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -d .venv ] || python3 -m venv .venv
. .venv/bin/activate
python -m pip install --quiet --editable ".[report]"

umbrella-jax demo "$@"
