#!/usr/bin/env bash
# Makes .venv if it is missing, installs the project, and goes the whole path on real scans.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/install.sh report

.venv/bin/umbrella-jax demo "$@"
