#!/usr/bin/env bash
# Runs the tests. Arguments go to pytest: ./launch/test.sh -k resume, ./launch/test.sh -m slow
#
#   ./launch/test.sh [--gpu] [pytest arguments]
#
# Files of tests run side by side, one on each core as far as memory goes (tests/conftest.py); -n 0: one after another.
# The first start installs into .venv (setup.sh says how). Tests marked slow are left out unless asked for.
# Tests that want the development corpus read its folder from BAJIE_DEV_DATA and skip without it.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

case ${1:-} in -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}" && exit ;; esac
bajie_setup test hf -- "$@"
cd "$bajie_root"
exec "$bajie_python" -m pytest -n logical --dist loadfile --no-loadscope-reorder ${bajie_args[@]+"${bajie_args[@]}"}
