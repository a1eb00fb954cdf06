#!/usr/bin/env bash
# Make .venv if it is missing, install the project, and run linters, type checker and tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
unset PYTHONDONTWRITEBYTECODE # set in some containers; every process would compile jax's sources again
bash scripts/install.sh dev
. .venv/bin/activate
# tests/report/test_report.py opens the page in a browser.
if ! command -v chromium-headless-shell chromium chromium-browser google-chrome >/dev/null; then
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "scripts/test.sh: no Chromium; install it (Debian: apt-get install chromium-headless-shell)" >&2
    exit 1
  fi
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends chromium-headless-shell fonts-dejavu-core >/dev/null
fi
# The export's PyTorch loader is also tested under transformers 4.46, in a separate process.
export UMBRELLA_TRANSFORMERS_446="$PWD/.venv/transformers-4.46.3"
if [ ! -e "$UMBRELLA_TRANSFORMERS_446/complete" ]; then
  UV_SYSTEM_CERTS=1 uv pip install --quiet --no-deps --require-hashes --target "$UMBRELLA_TRANSFORMERS_446" \
    --requirement requirements/transformers-4.46.txt
  touch "$UMBRELLA_TRANSFORMERS_446/complete"
fi

ruff check .
ruff format --check .
mypy
python scripts/voice.py umbrella_jax convert scripts docs README.md
# Two workers, in the order of tests/conftest.py. With a third, two cores take longer: each traces programs of its own.
pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
