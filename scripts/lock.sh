#!/usr/bin/env bash
# Update requirements/ to the newest versions that pyproject.toml allows, with all extras, for every Python and
# platform.
set -euo pipefail
cd "$(dirname "$0")/.."
python3 -m venv .venv
.venv/bin/python -m pip install --quiet --upgrade uv
export UV_SYSTEM_CERTS=1 UV_CUSTOM_COMPILE_COMMAND="bash scripts/lock.sh"
lock=(.venv/bin/uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes)
.venv/bin/uv --version | sed 's/uv \([0-9.]*\).*/uv==\1/' | "${lock[@]}" --output-file requirements/uv.txt -
"${lock[@]}" --all-extras --output-file requirements/lock.txt pyproject.toml
old=(transformers==4.46.3 tokenizers==0.20.3 huggingface-hub==0.36.2 requests urllib3 idna certifi charset-normalizer)
printf '%s\n' "${old[@]}" | "${lock[@]}" --no-deps --output-file requirements/transformers-4.46.txt -
# PyTorch's own index has builds only for CPUs, 2.13.0+cpu. Add the hash of the one for Python 3.11 on x86-64 Linux.
cpu=6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b
grep --quiet "$cpu" requirements/lock.txt || # uv keeps it if its index lists that build
  sed -i "s/^torch==2\.13\.0 .*/&\n    --hash=sha256:$cpu \\\\/" requirements/lock.txt
