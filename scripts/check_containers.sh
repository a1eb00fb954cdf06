#!/usr/bin/env bash
# bash scripts/check_containers.sh
# Lint the recipes of scripts/containers/ and compare them with pyproject.toml, resolve the packages of every image,
# install those of the image for CPUs into an empty directory, and build what this machine can build. The last lines
# list what was built. DEBIAN=1 builds in a temporary Debian (scripts/containers/in_debian.sh).
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/install.sh dev
. .venv/bin/activate
pytest tests/test_containers.py

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export UV_SYSTEM_CERTS=1
uv venv --quiet --python 3.11 "$work/empty"
for extras in report cuda12,report cuda13,report; do
  uv pip install --quiet --dry-run --python "$work/empty/bin/python" --constraint requirements/lock.txt ".[$extras]"
  echo "the lock resolves, for an empty Python 3.11: $extras"
done
bash scripts/install.sh report "$work/umbrella"
(cd "$work" && PATH=$work/umbrella/bin:$PATH umbrella-jax doctor)

bash ${DEBIAN:+scripts/containers/in_debian.sh bash} scripts/containers/build.sh
echo "only linted and resolved: scripts/containers/cuda.Dockerfile, requirements/environment.yml
only linted: scripts/containers/dev.Dockerfile"
