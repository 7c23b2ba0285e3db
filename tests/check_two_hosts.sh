#!/bin/sh
# Runs the lanes' tests as if there were two hosts, of two processes each, all of which may share one GPU: between hosts
# NCCL over sockets on loopback, on a host the peer transport. To NCCL each process is a host of its own: it would refuse
# two on one GPU.
# usage: check_two_hosts.sh USP_LAUNCH GPU_LAYERS
set -eu
. "$(dirname "$0")/gpus.sh"
need_gpus 1
export GPU_LAYERS="$2"
export NCCL_P2P_DISABLE=1 NCCL_SHM_DISABLE=1 NCCL_SOCKET_IFNAME=lo NCCL_NVLS_ENABLE=0
exec "$1" -n 4 --kill sh -c 'NCCL_HOSTID=host$RANK exec "$GPU_LAYERS" --two-hosts'
