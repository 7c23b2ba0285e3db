#!/bin/sh
# Sweeps meshes and lengths over NCCL with every pass replayed as a CUDA graph, in registered memory that each row allocates anew.
# usage: check_graphs.sh USP_BENCH
set -eu
gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
[ -z "${CUDA_VISIBLE_DEVICES:-}" ] || gpus=$(echo "$CUDA_VISIBLE_DEVICES" | tr , '\n' | grep -c .)
if [ "${gpus:-0}" -lt 2 ]; then
    echo "skipped: exchanges in graphs need 2 GPUs, here are ${gpus:-0}"
    exit 77
fi
for kind in softmax linear; do
    "$1" --quiet -g "$gpus" -G 1 -T 30 --shared-memory --kind $kind -b 4K -e 32K -f 8 --heads 16 --head-dim 128 -n 5 --budget 1
done
