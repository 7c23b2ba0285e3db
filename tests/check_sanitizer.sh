#!/bin/sh
# Runs a program of GPU tests under one tool of compute-sanitizer; skipped where that or a GPU is missing.
# usage: check_sanitizer.sh TOOL PROGRAM [ARGUMENT...]
set -eu
. "$(dirname "$0")/gpus.sh"
tool=$1
shift
need_gpus 1
if ! command -v compute-sanitizer >/dev/null 2>&1; then
    echo "skipped: compute-sanitizer is not here"
    exit 77
fi
# Refused calls are part of the tests (an allocation too large): the programs judge those, not the tool.
options='--error-exitcode 9'
[ "$tool" != memcheck ] || options="$options --report-api-errors no"
# racecheck follows a barrier's own threads alone: what one lane of a warp hands on at an mbarrier for all, once they
# have met, it calls a race. The kernels of which that is the way are left to check_hopper's schedules.
[ "$tool" != racecheck ] || options="$options --kernel-name-exclude kernel_substring=wgmma"
exec compute-sanitizer --tool "$tool" $options "$@"
