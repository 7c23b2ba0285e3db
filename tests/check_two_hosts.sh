#!/bin/sh
# Runs the layer tests over NCCL as if the GPUs were in two hosts: no peer access, no shared memory, sockets on loopback.
# usage: check_two_hosts.sh USP_LAUNCH GPU_LAYERS
set -eu
. "$(dirname "$0")/gpus.sh"
need_gpus 2
export GPU_LAYERS="$2" HALF=$((gpus / 2))
export NCCL_P2P_DISABLE=1 NCCL_SHM_DISABLE=1 NCCL_SOCKET_IFNAME=lo NCCL_NVLS_ENABLE=0
exec "$1" -n "$gpus" --kill sh -c 'NCCL_HOSTID=host$((RANK / HALF)) exec "$GPU_LAYERS"'
