#!/usr/bin/env bash
# Install the wheel into an empty environment and use it from an empty directory: command line, a shipped config, a
# short training, answers, and mypy --strict on the program that asks for them.
# PYTHON=python3.13 chooses another Python; LOCKED=1 installs the versions of requirements/lock.txt.
set -euo pipefail
cd "$(dirname "$0")/.."
tree=$PWD
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --require-hashes --requirement requirements/uv.txt
export UV_SYSTEM_CERTS=1
uv=$work/venv/bin/uv
"$uv" build --quiet --wheel --out-dir "$work/dist"
"$uv" pip install --quiet --python "$work/venv/bin/python" ${LOCKED:+--constraint requirements/lock.txt} \
  "$work"/dist/*.whl mypy
mkdir "$work/empty"
cp tests/helpers/outside.py "$work/outside.py"
cd "$work/empty"
unset PYTHONPATH
export PATH="$work/venv/bin:$PATH" PYTHONSAFEPATH=1
python -c 'import umbrella_jax, convert; print(umbrella_jax.__file__, convert.__file__)' >"$work/where"
if grep -F "$tree" "$work/where"; then exit 1; fi # imported from the checkout, not the wheel

umbrella-jax --help >"$work/help"
umbrella-jax doctor
umbrella-jax inspect --config tiny 2>"$work/err" && exit 1
grep -q model.base "$work/err" # the config is found, and names no base
umbrella-jax inspect --config t1 2>"$work/err" && exit 1
grep -q 'a shipped config: joint_0.5b, .*t1_0.5b' "$work/err"
python "$work/outside.py" "$work/demo" | tail -n 1
mypy --strict --cache-dir "$work/mypy" "$work/outside.py"
mypy --strict --cache-dir "$work/mypy" -c 'import umbrella_jax; model: int = umbrella_jax.load("run")' >"$work/err" && exit 1
grep -q '"Llava"' "$work/err" # the package has types, not Any
[ -z "$(ls -A)" ]
echo "$(python --version): the wheel works"
