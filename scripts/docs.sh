#!/usr/bin/env bash
# Builds the site into build/site, and fails on any warning, such as a dead link. `bash scripts/docs.sh serve` shows it at
# http://localhost:8000 and follows your edits. Needs the extra `docs`.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- build
export NO_MKDOCS_2_WARNING=1 # an advertisement of mkdocs-material
exec python -m mkdocs "$@" --strict --config-file docs/site/mkdocs.yml
