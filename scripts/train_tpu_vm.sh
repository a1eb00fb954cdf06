#!/usr/bin/env bash
# Train on a TPU slice of one or many hosts. If the slice is preempted, create another one and resume.
#
#   scripts/train_tpu_vm.sh [--dry-run] NAME ZONE TYPE WHEEL SHARE FLAGS
#
# NAME   name of the slice, which is created if it does not exist
# TYPE   v5litepod-16, v5p-64, ...
# WHEEL  this project's wheel: pip wheel --no-deps .
# SHARE  HOST:/PATH of an NFS (Filestore) with base, data and runs, mounted as /mnt/umbrella on every host
# FLAGS  flags of `umbrella-jax train`
#
# Environment: RUNTIME is the image of the hosts; SPOT=1 asks for a cheaper slice that can be preempted. --dry-run
# prints the commands. The script runs until training ends, so start it on a machine that stays on.
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
quoted=$(printf ' %q' "$@") # quoted for the hosts' shell
mount=$(printf '%q' "$share")
file=$(printf '%q' "$(basename "$wheel")")
compiled=JAX_COMPILATION_CACHE_DIR=/mnt/umbrella/compiled # a resumed run does not compile again

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

state() { # prints nothing if there is no slice
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
  sleep "${POLL_SECONDS:-30}" # a preemption takes a while to show
  # 143: a host got SIGTERM, for maintenance perhaps. The run has saved, and resumes when the slice is back.
  if [ $code -ne 143 ] && [ "$(state)" = ACTIVE ]; then
    echo "The command failed, not the TPU. $name still exists and costs money; to delete it:" >&2
    echo "  gcloud compute tpus queued-resources delete $name --zone=$zone --force" >&2
    exit $code
  fi
  resume=" --resume"
done
