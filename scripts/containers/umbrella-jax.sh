#!/bin/sh
# umbrella-jax in the Apptainer image. Home directories are small on many clusters, so keep caches out of them, unless
# variables of the host name other directories. (%environment does not see these variables: it would override them.)
[ -w "${TMPDIR:-/tmp}" ] || TMPDIR=/tmp # a directory that is not bound does not exist in the container
export TMPDIR="${TMPDIR:-/tmp}"
cache=$TMPDIR/umbrella-$(id -u)
export HF_HOME="${HF_HOME:-$cache/huggingface}"
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$cache/compiled}"
export MPLCONFIGDIR="${MPLCONFIGDIR:-$cache/matplotlib}"
exec /opt/umbrella/bin/umbrella-jax "$@"
