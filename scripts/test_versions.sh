#!/usr/bin/env bash
# bash scripts/test_versions.sh lowest|newest: a part of the suite with the lowest or the newest versions that
# pyproject.toml allows, in .venv-lowest or .venv-newest. PYTHON=python3.13 takes another Python.
set -euo pipefail
cd "$(dirname "$0")/.."
case ${1:-} in
  lowest) resolution=lowest-direct ;;
  newest) resolution=highest ;;
  *) sed -n '2,3s/^# \{0,1\}//p' "$0" >&2 && exit 2 ;;
esac
venv=.venv-$1
"${PYTHON:-python3}" -m venv --clear "$venv"
"$venv/bin/python" -m pip install --quiet --require-hashes --requirement requirements/uv.txt
export UV_SYSTEM_CERTS=1
install=("$venv/bin/uv" pip install --quiet --python "$venv/bin/python")
"${install[@]}" --resolution "$resolution" --editable ".[quantize,report,tensorboard]"
"${install[@]}" hypothesis pytest pytest-xdist # of any version: these are no dependencies of what is tested
"$venv/bin/uv" pip list --python "$venv/bin/python" 2>/dev/null |
  grep -E '^(jax|jaxlib|flax|optax|orbax-checkpoint|grain|numpy|transformers|nibabel|pydantic|qwix) '

"$venv/bin/python" -m pytest -n 2 --dist loadfile "${@:2}" \
  tests/models/test_golden.py tests/training/test_step.py tests/training/test_checkpoint.py tests/test_sharding.py \
  tests/evaluation/test_generate.py tests/convert/test_round_trip.py tests/convert/test_hf_config.py \
  tests/data/test_volume.py tests/data/test_loader.py tests/data/test_tokenize.py tests/test_prediction.py tests/test_run.py
