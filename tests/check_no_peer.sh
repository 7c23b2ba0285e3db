#!/bin/sh
# Where one rank cannot have the peer transport no rank has it, whichever step fails and whoever's: layers run by NCCL
# alone, and a world that asked for peer is refused everywhere by one sentence. Four processes, as in check_two_hosts.sh.
# usage: check_no_peer.sh USP_LAUNCH USP_BENCH NO_PEER_LIBRARY
set -eu
. "$(dirname "$0")/gpus.sh"
need_gpus 1
launch=$1
export BENCH="$2" LIBRARY="$3"
export NCCL_P2P_DISABLE=1 NCCL_SHM_DISABLE=1 NCCL_SOCKET_IFNAME=lo NCCL_NVLS_ENABLE=0

# run STEP RANK TRANSPORT: that rank's step fails; what all say goes to $said.
run() {
    export NO_PEER="$1" WHO="$2" TRANSPORT="$3"
    status=0
    said=$("$launch" -n 4 -t 60 --kill sh -c 'export NCCL_HOSTID=host$RANK
        [ "$RANK" != "$WHO" ] || export LD_PRELOAD="$LIBRARY"
        exec "$BENCH" --kind softmax --heads 8 -b 1K -e 1K -n 1 -u 2 -r 2 --quiet --transport "$TRANSPORT"' 2>&1) || status=$?
}

# want STATUS TEXT COUNT: so many lines with it.
want() {
    [ "$status" = "$1" ] && [ "$(echo "$said" | grep -c "$2")" = "$3" ] && return
    echo "rank $WHO without $NO_PEER, transport $TRANSPORT: status $status, not $1 with $3 x '$2':"
    echo "$said"
    exit 1
}

run none 0 auto
want 0 'ranks over nccl+peer,' 1
for step in shm ipc; do
    for rank in 0 3; do
        run $step $rank auto
        want 0 'ranks over nccl,' 1
        run $step $rank peer
        want 2 "usp_bench: rank $rank: " 4
    done
done
