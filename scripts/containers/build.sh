#!/usr/bin/env bash
# bash scripts/containers/build.sh
# Build the image for CPUs with Docker or Podman, and the one for clusters with Apptainer, without CUDA. Run
# `umbrella-jax doctor` in each. BASE=DIRECTORY is a root file system to use in place of the base image.
set -euo pipefail
cd "$(dirname "$0")/../.."
work=$(mktemp -d)
# A directory of Apptainer has files of its fake users, whom only a user namespace may remove.
trap 'rm -rf "$work" 2>/dev/null || unshare --map-auto --map-root-user rm -rf "$work"' EXIT
engine=
for program in docker podman; do
  if [ -z "$engine" ] && "$program" info >"$work/info" 2>&1; then engine=$program; fi
done

if [ -n "$engine" ]; then
  options=()
  if [ -n "${BASE:-}" ]; then
    tar --create --directory "$BASE" . | "$engine" import - umbrella-base
    options=(--build-arg BASE=umbrella-base)
  fi
  "$engine" build "${options[@]}" --file scripts/containers/cpu.Dockerfile --tag umbrella-jax:cpu .
  mkdir "$work/user" # one whom the image does not know, as docker run --user may have; needs no right to run containers
  printf 'FROM umbrella-jax:cpu\nUSER 4242:4242\nRUN ["umbrella-jax", "doctor"]\n' >"$work/user/Dockerfile"
  "$engine" build "$work/user"
  summary="built, and doctor passes: scripts/containers/cpu.Dockerfile ($engine)"
else
  summary="not built, no Docker or Podman: scripts/containers/cpu.Dockerfile"
fi

if command -v apptainer >/dev/null; then
  recipe=scripts/containers/apptainer.def
  if [ -n "${BASE:-}" ]; then
    sed -e 's/^Bootstrap: docker$/Bootstrap: localimage/' -e "s#^From: .*#From: $BASE#" "$recipe" >"$work/apptainer.def"
    recipe=$work/apptainer.def
  fi
  apptainer build --sandbox --fakeroot --build-arg EXTRAS=report "$work/umbrella" "$recipe" # a directory: no compression
  mkdir "$work/home"
  apptainer exec --home "$work/home" "$work/umbrella" umbrella-jax doctor
  [ -z "$(ls -A "$work/home")" ] # nothing is written to the home directory
  summary+=$'\n'"built, and doctor passes: scripts/containers/apptainer.def"
else
  summary+=$'\n'"not built, no Apptainer: scripts/containers/apptainer.def"
fi
echo "$summary"
