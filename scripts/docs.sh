#!/usr/bin/env bash
# Build the site into build/site; fail on any warning, such as a dead link. `bash scripts/docs.sh serve` shows the site at
# http://localhost:8000 and updates it as you edit. Needs the extra `docs`.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- build
export NO_MKDOCS_2_WARNING=1 # an advertisement of mkdocs-material
exec python -m mkdocs "$@" --strict --config-file docs/site/mkdocs.yml
