#!/usr/bin/env bash
# Make .venv if it is missing, install the project, and run the whole workflow on real scans.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/install.sh report

.venv/bin/umbrella-jax demo "$@"
