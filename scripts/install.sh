#!/usr/bin/env bash
# bash scripts/install.sh EXTRAS: makes .venv if it is missing, and installs the project there, editable, with EXTRAS, in
# the versions of requirements/lock.txt, whose hashes are checked. bash scripts/lock.sh renews those.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -d .venv ] || python3 -m venv .venv
. .venv/bin/activate
python -m pip install --quiet --require-hashes --requirement requirements/uv.txt
# Where pip would find them: a PyTorch for the CPU may lie there, instead of gigabytes for CUDA.
links=${PIP_FIND_LINKS:-$(python -m pip config get global.find-links 2>/dev/null || true)}
[ -z "$links" ] || export UV_FIND_LINKS="${links// /,}"
UV_SYSTEM_CERTS=1 uv pip install --quiet --constraint requirements/lock.txt --editable ".[$1]"
