#!/bin/sh
# Installs what is missing (Debian), builds everything and runs every test that this machine can run, but those of the suite slow.
# usage: sh tests/run.sh [--quick] [--suite NAME]
#   --quick        leaves the sanitizer builds out
#   --suite NAME   runs one suite: cpu, plain, examples, gpu, slow; sanitize and race in the builds of these names
set -eu
cd "$(dirname "$0")/.."
builds='test sanitize race' suite=
while [ $# -gt 0 ]; do
    case $1 in
    --quick) builds=test ;;
    --suite=?*) suite=${1#*=} ;;
    --suite) suite=${2:-} && [ -n "$suite" ] && shift || { echo "run.sh: --suite wants a name" >&2; exit 2; } ;;
    *) echo "run.sh: unknown option '$1'; usage: sh tests/run.sh [--quick] [--suite NAME]" >&2; exit 2 ;;
    esac
    shift
done
case $suite in
'') ;;
sanitize | race) builds=$suite ;;
*) builds=test ;;
esac
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
began=$(date +%s)
say() { printf '== %s (%d s)\n' "$*" "$(($(date +%s) - began))"; }
wanted() { case " $builds " in *" $1 "*) ;; *) return 1 ;; esac }

install_missing() {
    missing=
    command -v cc >/dev/null 2>&1 || missing="$missing gcc libc6-dev"
    command -v c++ >/dev/null 2>&1 || missing="$missing g++"
    command -v meson >/dev/null 2>&1 || missing="$missing meson"
    command -v ninja >/dev/null 2>&1 || missing="$missing ninja-build"
    command -v pkg-config >/dev/null 2>&1 || missing="$missing pkg-config"
    command -v python3 >/dev/null 2>&1 || missing="$missing python3"
    pkg-config --exists criterion 2>/dev/null || missing="$missing libcriterion-dev"
    command -v mpicc >/dev/null 2>&1 || missing="$missing libopenmpi-dev openmpi-bin"
    command -v mpiexec.hydra >/dev/null 2>&1 || missing="$missing mpich"
    [ "$(id -u)" != 0 ] || command -v slurmctld >/dev/null 2>&1 || missing="$missing slurmctld slurmd slurm-client munge"
    command -v help2man >/dev/null 2>&1 || missing="$missing help2man"
    command -v cmake >/dev/null 2>&1 || missing="$missing cmake"
    [ -n "$missing" ] || return 0
    root=
    [ "$(id -u)" = 0 ] || root=sudo
    if ! command -v apt-get >/dev/null 2>&1 || { [ -n "$root" ] && ! command -v sudo >/dev/null 2>&1; }; then
        echo "run.sh: please install$missing, then run this again" >&2
        exit 1
    fi
    say "installing:$missing"
    $root apt-get update -qq
    $root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >"$logs/install" 2>&1 ||
        { cat "$logs/install"; exit 1; }
}

# build FOLDER OPTIONS...: configures once, then builds.
build() {
    folder=$1
    shift
    if [ -f "$folder/build.ninja" ]; then
        meson configure "$folder" "$@" >/dev/null
    else
        meson setup "$folder" "$@" >"$logs/setup" 2>&1 || { cat "$logs/setup"; exit 1; }
    fi
    say "building $folder $*"
    ninja -C "$folder" >"$logs/build" 2>&1 || { tail -n 60 "$logs/build"; exit 1; }
}

passed=0 failed=0 skipped=0
# run FOLDER ARGUMENTS...: meson test, a line for each test as it ends; its counts are added to the sums.
run() {
    folder=$1
    shift
    say "testing $folder $*"
    { meson test -C "$folder" --no-rebuild --print-errorlogs "$@" 2>&1 || true; } | tee "$logs/test" |
        grep --line-buffered -vE '^(ninja|Full log|Expected Fail|Unexpected Pass|$)' || true
    count() { sed -n "s/^$1: *\([0-9]*\).*/\1/p" "$logs/test" | tail -n 1; }
    ok=$(count Ok) bad=$(count Fail) late=$(count Timeout) skip=$(count Skipped) odd=$(count 'Unexpected Pass')
    [ -n "$ok" ] || { echo "meson test printed no counts"; failed=$((failed + 1)); return; }
    passed=$((passed + ok))
    failed=$((failed + bad + late + odd))
    skipped=$((skipped + skip))
}

# MPI and CUDA have leaks and races of their own; what the sanitizers see here is the library on the CPU.
cpu='-Dcuda=disabled -Dmpi=disabled -Dbuildtype=debugoptimized -Db_lundef=false'
install_missing
if wanted test; then
    build build-test -Dmpi=auto
    run build-test ${suite:+--suite "$suite"}
fi
if wanted sanitize; then
    build build-asan $cpu -Db_sanitize=address,undefined -Dc_args=-fno-sanitize-recover=all
    run build-asan --suite sanitize --timeout-multiplier 4
fi
if wanted race; then
    build build-tsan $cpu -Db_sanitize=thread -Dbench=false -Dexamples=false
    run build-tsan --suite race --timeout-multiplier 4
fi
say 'done'
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" = 0 ] && [ "$passed" -gt 0 ]
