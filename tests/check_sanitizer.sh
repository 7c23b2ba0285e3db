#!/bin/sh
# Runs a program of GPU tests under one tool of compute-sanitizer; skipped where that or a GPU is missing.
# usage: check_sanitizer.sh TOOL PROGRAM [ARGUMENT...]
set -eu
tool=$1
shift
skip() {
    echo "skipped: $1"
    exit 77
}
command -v compute-sanitizer >/dev/null 2>&1 || skip "compute-sanitizer is not here"
nvidia-smi -L 2>/dev/null | grep -q '^GPU' || skip "no GPU here"
# Refused calls are part of the tests (an allocation too large): the programs judge those, not the tool.
options='--error-exitcode 9'
[ "$tool" != memcheck ] || options="$options --report-api-errors no"
exec compute-sanitizer --tool "$tool" $options "$@"
