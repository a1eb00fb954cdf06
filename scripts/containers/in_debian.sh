#!/usr/bin/env bash
# bash scripts/containers/in_debian.sh COMMAND...
# Run a command in a temporary Debian with Apptainer and Podman, as a user without root rights. It starts in a copy of
# the checkout. A second Debian with Python 3.11, in $BASE, serves as base image. This is for machines that reach
# Debian's packages but no registry of images. Needs root, debootstrap, and 10 GB in TMPDIR.
set -euo pipefail
cd "$(dirname "$0")/../.."
root=$(mktemp -d)
trap 'rm -rf --one-file-system "$root"' EXIT
mirror=http://deb.debian.org/debian
debootstrap --variant=minbase --include=apptainer,buildah,ca-certificates,crun,netavark,passt,podman,python3-minimal \
  sid "$root" "$mirror" >"$root.log"
debootstrap --variant=minbase --include=ca-certificates,python3-venv bookworm "$root/base" "$mirror" >"$root.log"
rm "$root.log"
find "$root/base/dev" -mindepth 1 -delete # an image has no devices
chmod 755 "$root"
chmod -R a+rX "$root/base"
for debian in "$root" "$root/base"; do
  cp --dereference /etc/hosts /etc/resolv.conf "$debian/etc"
  cp /etc/ssl/certs/ca-certificates.crt "$debian/etc/ssl/certs" # with those that the machine's owner added
done
mkdir -p "$root/lab/checkout" "$root/etc/containers"
git ls-files -z | xargs -0 cp --parents --target-directory "$root/lab/checkout"
cat >"$root/etc/containers/containers.conf" <<'EOF'
[containers]
cgroups = "disabled"
netns = "host"
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
EOF
chroot "$root" useradd --home-dir /lab lab # buildah resolves the home directory of the user
echo lab:100000:65536 | tee "$root/etc/subuid" >"$root/etc/subgid"
chroot "$root" chown -R lab /lab
# pivot_root, because the kernel refuses user namespaces in a chroot. The inner shell expands the variables.
# shellcheck disable=SC2016
unshare --mount bash -euc '
mount --bind "$1" "$1"
cd "$1"
mount --rbind /dev dev
mount --rbind /sys sys
mount -t proc proc proc
mkdir old
pivot_root . old
umount --lazy old
cd /lab/checkout
export HOME=/lab BASE=/base BUILDAH_ISOLATION=chroot TMPDIR=/lab
exec setpriv --reuid=lab --regid=lab --clear-groups "${@:2}"' bash "$root" "$@"
