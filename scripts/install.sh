#!/usr/bin/env bash
# bash scripts/install.sh EXTRAS
# Make .venv if it is missing, and install the project there, editable, with EXTRAS (comma-separated) and the versions
# of requirements/lock.txt. uv checks their hashes. bash scripts/lock.sh updates the versions.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -d .venv ] || python3 -m venv .venv
. .venv/bin/activate
python -m pip install --quiet --require-hashes --requirement requirements/uv.txt
# Use pip's folders of wheels too: they may have a PyTorch for CPUs, without the gigabytes for CUDA.
links=${PIP_FIND_LINKS:-$(python -m pip config get global.find-links 2>/dev/null || true)}
[ -z "$links" ] || export UV_FIND_LINKS="${links// /,}"
UV_SYSTEM_CERTS=1 uv pip install --quiet --constraint requirements/lock.txt --editable ".[$1]"
