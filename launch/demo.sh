#!/usr/bin/env bash
# From Chinese text to a pretrained, resumed and grown language model, on a bare Linux machine with two CPU cores.
#
#   ./launch/demo.sh [--gpu] [options of `python -m launch demo`]
#
# The first start installs into .venv (setup.sh says how); every start then runs the demo.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

case ${1:-} in -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}" && exit ;; esac
bajie_setup -- "$@"
exec "$bajie_python" -P -m launch demo ${bajie_args[@]+"${bajie_args[@]}"}
