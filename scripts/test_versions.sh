#!/usr/bin/env bash
# bash scripts/test_versions.sh lowest|newest: run a part of the suite with the lowest or the newest versions that
# pyproject.toml allows, in .venv-lowest or .venv-newest. PYTHON=python3.13 chooses another Python.
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
"${install[@]}" beartype hypothesis pytest pytest-xdist # any version: the project does not depend on these
"$venv/bin/uv" pip list --python "$venv/bin/python" 2>/dev/null |
  grep -E '^(jax|jaxlib|flax|optax|orbax-checkpoint|grain|numpy|transformers|nibabel|pydantic|qwix) '

# Only tests that need no PyTorch, whose versions differ. Warnings, errors elsewhere, are only listed: other versions warn
# of other things.
run=tests/run/test_train.py::test_ mesh=tests/test_sharding.py::test_
"$venv/bin/python" -m pytest -W default -n 2 --dist loadfile "${@:2}" \
  --deselect tests/convert/test_safetensors_files.py::test_folder_without_weights \
  tests/models/test_golden.py tests/training/test_step.py tests/training/test_checkpoint.py \
  tests/inference/test_generate.py tests/convert/test_safetensors_files.py tests/data/test_loader.py tests/data/test_tokenize.py \
  "$run"{a_run_writes_these_files,each_evaluation_writes_its_answers,secrets_go_nowhere} \
  "$mesh"{any_mesh_is_one_device,a_checkpoint_goes_on_on_another_mesh} tests/doctor/test_diagnose.py::test_this_machine_has_no_problems
