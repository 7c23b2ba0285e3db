#!/bin/sh
# Runs the layer tests over NCCL as if the GPUs were in two hosts: no peer access, no shared memory, sockets on loopback.
# usage: check_two_hosts.sh USP_LAUNCH GPU_LAYERS
set -eu
gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
[ -z "${CUDA_VISIBLE_DEVICES:-}" ] || gpus=$(echo "$CUDA_VISIBLE_DEVICES" | tr , '\n' | grep -c .)
if [ "${gpus:-0}" -lt 2 ]; then
    echo "skipped: two emulated hosts need 2 GPUs, here are ${gpus:-0}"
    exit 77
fi
export GPU_LAYERS="$2" HALF=$((gpus / 2))
export NCCL_P2P_DISABLE=1 NCCL_SHM_DISABLE=1 NCCL_SOCKET_IFNAME=lo NCCL_NVLS_ENABLE=0
exec "$1" -n "$gpus" -t 280 --kill sh -c 'NCCL_HOSTID=host$((RANK / HALF)) exec "$GPU_LAYERS"'
