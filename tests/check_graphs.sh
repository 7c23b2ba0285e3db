#!/bin/sh
# Sweeps meshes and lengths over NCCL with every pass replayed as a CUDA graph, in registered memory that each row allocates anew.
# usage: check_graphs.sh USP_BENCH
set -eu
. "$(dirname "$0")/gpus.sh"
need_gpus 2
for kind in softmax linear; do
    "$1" --quiet -g "$gpus" -G 1 -T 30 --shared-memory --kind $kind -b 4K -e 32K -f 8 --heads 16 --head-dim 128 -n 5 --budget 1
done
