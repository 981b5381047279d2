#!/usr/bin/env bash
# Writes ops/requirements.lock anew: the newest versions that setup.py allows, with the hashes of all their files.
# Needs uv. Any arguments go to it: `ops/lock.sh --upgrade-package twisted` leaves the other versions as they are.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

lock=ops/requirements.lock
(($#)) || set -- --upgrade
# setuptools builds our own wheel (see pyproject.toml): it is locked with the rest.
echo 'setuptools>=78.1.1' |
    uv pip compile --quiet --no-config --no-header --no-annotate --no-strip-extras --generate-hashes \
        --universal --python-version 3.11 --extra redis --extra local --output-file "$lock" "$@" setup.py -
comment='# What the image is made of (see Dockerfile): exact versions with the hashes of their files. Written by ops/lock.sh.'
printf '%s\n' "$comment" "$(cat "$lock")" >"$lock.new"
mv -- "$lock.new" "$lock"
