#!/usr/bin/env bash
# Trains on a TPU slice of one or many hosts; when that is taken away, goes on with another one.
#
#   scripts/train_tpu_vm.sh [--dry-run] NAME ZONE TYPE WHEEL SHARE FLAGS
#
# NAME   of the slice, which is made if there is none
# TYPE   v5litepod-16, v5p-64, ...
# WHEEL  this project's: pip wheel --no-deps .
# SHARE  HOST:/PATH of an NFS (Filestore) that holds base, data and runs: /mnt/umbrella on every host
# FLAGS  of `umbrella-jax train`
#
# RUNTIME (image of the hosts) and SPOT=1 (may be taken away, costs less) come from the environment. --dry-run prints
# the commands. Start it where it can stay: it waits for capacity, and as long as the training takes.
set -euo pipefail

dry=
if [ "${1:-}" = --dry-run ]; then
  dry=1
  shift
fi
if [ $# -lt 6 ]; then
  sed -n '4,13s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
name=$1 zone=$2 type=$3 wheel=$4 share=$5
shift 5
quoted=$(printf ' %q' "$@") # for the hosts' shell
mount=$(printf '%q' "$share")
file=$(printf '%q' "$(basename "$wheel")")
compiled=JAX_COMPILATION_CACHE_DIR=/mnt/umbrella/compiled # so that a run that goes on does not compile again

run() {
  if [ -n "$dry" ]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

queue() { # VERB FLAGS
  run gcloud compute tpus queued-resources "$1" "$name" --zone="$zone" "${@:2}"
}

on_all_hosts() { # COMMAND
  run gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --batch-size=all --command="$1"
}

state() { # nothing where there is no slice
  if [ -n "$dry" ]; then
    echo "$made"
  else
    queue describe --format='value(state.state)' 2>/dev/null || true
  fi
}

made=
resume=
while true; do
  while now=$(state) && [ "$now" != ACTIVE ]; do
    case $now in
    '')
      queue create --node-id="$name" --accelerator-type="$type" \
        --runtime-version="${RUNTIME:-tpu-ubuntu2204-base}" ${SPOT:+--spot}
      made=ACTIVE
      ;;
    FAILED | SUSPENDED) queue delete --force --quiet ;;
    *) sleep "${POLL_SECONDS:-30}" ;;
    esac
  done

  code=0
  {
    run gcloud compute tpus tpu-vm scp "$wheel" "$name:" --zone="$zone" --worker=all --batch-size=all &&
      on_all_hosts "set -e; sudo apt-get -qq update; sudo apt-get -qq install -y nfs-common
sudo mkdir -p /mnt/umbrella; mountpoint -q /mnt/umbrella || sudo mount -t nfs $mount /mnt/umbrella
python3 -m pip install --quiet --user uv; ~/.local/bin/uv venv --quiet --allow-existing --python 3.12 ~/umbrella
~/.local/bin/uv pip install --quiet --python ~/umbrella \$HOME/${file}[tpu]" &&
      on_all_hosts "cd /mnt/umbrella; $compiled ~/umbrella/bin/umbrella-jax train$quoted$resume"
  } || code=$?

  if [ $code -eq 0 ]; then
    queue delete --force --quiet
    exit
  fi
  sleep "${POLL_SECONDS:-30}" # until it shows whether the slice was taken away
  # 143: a host was told to stop, for maintenance say; the run saved, and goes on when the slice is back
  if [ $code -ne 143 ] && [ "$(state)" = ACTIVE ]; then
    echo "The command failed, not the TPU. $name is kept, and costs; to delete it:" >&2
    echo "  gcloud compute tpus queued-resources delete $name --zone=$zone --force" >&2
    exit $code
  fi
  resume=" --resume"
done
