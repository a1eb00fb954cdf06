#!/usr/bin/env bash
# bash scripts/check_tour.sh
# Run docs/tour.ipynb as Colab does: in an environment that has only Jupyter, with the wheel next to the notebook, whose
# first cell installs it from there.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --require-hashes --requirement requirements/uv.txt
export UV_SYSTEM_CERTS=1
"$work/venv/bin/uv" pip install --quiet --python "$work/venv/bin/python" ipykernel nbclient
"$work/venv/bin/uv" build --quiet --wheel --out-dir "$work"
cp docs/tour.ipynb "$work"
cd "$work"
unset PYTHONPATH
venv/bin/jupyter execute --output=executed tour.ipynb
grep -E 'step [0-9]+: loss|[0-9]+ of [0-9]+ held-out|has [0-9.]+ times' executed.ipynb
