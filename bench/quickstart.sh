#!/bin/sh
# quickstart.sh - from a fresh Debian machine to the main job: installs what is missing, builds, trains a small language
# model on one rank and on a 2 x 2 mesh, shows that the loss is the same, and sweeps the library; with GPUs, also there.
#
# usage: sh bench/quickstart.sh [TEXT...]
# TEXT: what to learn, a file or a folder of *.md files, seen from the top of the tree (default: README.md docs).
# STEPS=50 in the environment trains for fewer steps.
set -eu
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- README.md docs
build='build-quickstart'
results=$build/results
began=$(date +%s)

say() {
    printf '\n== %s (%d s)\n' "$1" "$(($(date +%s) - began))"
}

# Everything that apt-get would be asked for is looked for first; a machine that has it all needs no rights.
install_missing() {
    missing=
    command -v gcc > /dev/null || missing="$missing gcc"
    [ -e /usr/include/stdio.h ] || missing="$missing libc6-dev"
    command -v meson > /dev/null || missing="$missing meson"
    command -v ninja > /dev/null || missing="$missing ninja-build"
    command -v pkg-config > /dev/null || missing="$missing pkg-config"
    [ -n "$missing" ] || return 0
    say "installing$missing"
    if [ "$(id -u)" = 0 ]; then rights=; else rights=sudo; fi
    if ! command -v apt-get > /dev/null || { [ -n "$rights" ] && ! command -v sudo > /dev/null; }; then
        echo "quickstart: please install$missing, then run this again" >&2
        exit 1
    fi
    $rights apt-get update -qq
    # shellcheck disable=SC2086
    $rights env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing > /dev/null
}

gpu_count() {
    command -v nvidia-smi > /dev/null || { echo 0; return; }
    nvidia-smi -L 2> /dev/null | grep -c '^GPU' || true
}

# GPU kernels take minutes to compile, so they are built only where a GPU can run them.
build_all() {
    if [ "$gpus" -gt 0 ]; then cuda=auto; else cuda=disabled; fi
    say 'building'
    [ -e $build/build.ninja ] ||
        meson setup $build --buildtype=release -Dtests=false -Dcuda=$cuda > $build.log 2>&1 ||
        { cat $build.log; exit 1; }
    ninja -C $build > $build.log 2>&1 || { tail -n 40 $build.log; exit 1; }
    rm -f $build.log
    mkdir -p $results
}

# train NAME MESH TEXT... : shows its progress and leaves results/NAME.csv
train() {
    name=$1
    mesh=$2
    shift 2
    # shellcheck disable=SC2086
    $build/docs/examples/07_train/train $mesh --steps "${STEPS:-200}" --csv "$results/$name.csv" "$@"
}

# Both curves in one file, step,one_rank,mesh_2x2, and the held-out losses as a table.
compare_curves() {
    paste -d, $results/one_rank.csv $results/mesh_2x2.csv > $results/both.csv
    awk -F, 'NR == 1 { print "step,one_rank,mesh_2x2"; next }
        { print $1 "," $2 "," $5 }' $results/both.csv > $results/loss.csv
    awk -F, 'NR == 1 {
            printf "%6s %26s %26s\n", "", "1 rank", "2 x 2 mesh"
            printf "%6s %13s%13s %13s%13s\n", "step", "train", "held-out", "train", "held-out"
        }
        NR > 1 && $3 != "" { printf "%6d %13.5f%13.5f %13.5f%13.5f\n", $1, $2, $3, $5, $6 }' $results/both.csv
    awk -F, 'NR > 1 { apart = ($2 > $5 ? $2 - $5 : $5 - $2) / $2; if (apart > most) most = apart }
        END { printf "largest relative difference of the training loss: %.1e\n", most }' $results/both.csv
    $build/bench/usp_plot $results/loss.csv -o $results/loss.svg
    echo "plot: $results/loss.svg"
}

# The mesh must not show in the loss, and 200 steps must have taught the model something: below 2.8 nats held out, from 5.5.
judge_curves() {
    awk -F, -v steps="${STEPS:-200}" 'NR > 1 {
            apart = ($2 > $5 ? $2 - $5 : $5 - $2) / $2
            if ($1 <= 50 && apart > early) early = apart
            last = apart
            if ($3 != "") { one = $3; mesh = $6 }
        }
        END {
            if (early > 1e-4 || last > 5e-3) { print "FAILED: the losses of 1 rank and of 2 x 2 differ"; exit 1 }
            if (steps >= 200 && (one >= 2.8 || mesh >= 2.8)) { print "FAILED: the model has not learned"; exit 1 }
            printf "held out: %.3f on 1 rank, %.3f on 2 x 2: the mesh does not show\n", one, mesh
        }' $results/both.csv
}

# The sweep and the projections on the GPUs, where there are GPUs and the build has CUDA.
run_gpus() {
    [ "$gpus" -gt 0 ] || return 0
    if [ ! -x $build/docs/examples/06_projections_cublaslt ]; then
        echo "$gpus GPUs are here, but no CUDA toolkit was found to build for them"
        return 0
    fi
    say "sweep on $gpus GPU(s)"
    $build/bench/usp_bench -g "$gpus" -b 8K -e 32K -f 2 --head-dim 128 -n 10 --csv $results/sweep_gpu.csv
    say "projections around a layer on $gpus GPU(s)"
    $build/docs/examples/06_projections_cublaslt
}

gpus=$(gpu_count)
install_missing
build_all
say 'training on 1 rank'
train one_rank '-u 1 -r 1' "$@"
say 'training on 4 ranks: ulysses 2 x ring 2'
train mesh_2x2 '-u 2 -r 2' "$@"
say 'the two loss curves'
compare_curves
judge_curves
say 'sweep on 4 thread-ranks'
$build/bench/usp_bench -t 4 -b 1K -e 2K -n 5 --csv $results/sweep.csv
run_gpus
say 'done'
