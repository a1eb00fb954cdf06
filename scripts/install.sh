#!/usr/bin/env bash
# bash scripts/install.sh EXTRAS [DIRECTORY]
# Install the project with EXTRAS (comma-separated) and the versions of requirements/lock.txt, whose hashes uv checks.
# Without DIRECTORY: editable, into .venv. With one: into a virtual environment there, which works without the checkout.
# Either is made if missing. bash scripts/lock.sh updates the versions.
set -euo pipefail
cd "$(dirname "$0")/.."
environment=${2:-.venv}
[ -d "$environment" ] || python3 -m venv "$environment"
. "$environment/bin/activate"
python -m pip install --quiet --require-hashes --requirement requirements/uv.txt
# Use pip's folders of wheels too: they may have a PyTorch for CPUs, without the gigabytes for CUDA.
links=${PIP_FIND_LINKS:-$(python -m pip config get global.find-links 2>/dev/null || true)}
[ -z "$links" ] || export UV_FIND_LINKS="${links// /,}"
project=(--editable ".[$1]")
[ $# -lt 2 ] || project=(--compile-bytecode ".[$1]")
UV_SYSTEM_CERTS=1 uv pip install --quiet --constraint requirements/lock.txt --build-constraint requirements/lock.txt \
  "${project[@]}"
