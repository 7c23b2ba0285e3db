#!/bin/sh
# Starts jobs by real launchers, as many as there are here: Open MPI's mpirun, MPICH's mpiexec (hydra) and, for root, a
# SLURM of one node that is set up for this. Two jobs of each at once; ranks behind shells; a launcher inside another's
# allocation. usage: check_launchers.sh JOB
set -u
job=$1
work=$(mktemp -d)
export SLURM_CONF="$work/slurm.conf"
unset USP_JOB_TOKEN MASTER_ADDR MASTER_PORT
wrong=0 checks=0

stop_slurm() {
    for daemon in slurmctld slurmd munged; do
        [ ! -s "$work/$daemon.pid" ] || kill "$(cat "$work/$daemon.pid")" 2>/dev/null || true
    done
}
trap 'stop_slurm; rm -rf "$work"' EXIT

# run NUMBER SIZE COMMAND...: in the background; the command and then `job NUMBER SIZE`.
run() {
    number=$1 size=$2
    shift 2
    { timeout 60 "$@" "$job" "$number" "$size" >"$work/out.$number" 2>&1; echo $? >"$work/status.$number"; } &
    started="$started $number"
}
# judge WHAT: waits for all that run() has started.
judge() {
    wait
    for number in $started; do
        checks=$((checks + 1))
        [ "$(cat "$work/status.$number")" = 0 ] && continue
        wrong=$((wrong + 1))
        echo "FAIL: $1: job $number ended with $(cat "$work/status.$number")"
        sed 's/^/    /' "$work/out.$number"
    done
    started=
}
started=

# ---- Open MPI and MPICH ----------------------------------------------------------------------------------------------

ompi='mpirun.openmpi --allow-run-as-root --oversubscribe'
if command -v mpirun.openmpi >/dev/null; then
    run 1 3 $ompi -np 3
    run 2 3 $ompi -np 3
    run 3 2 $ompi -np 2 sh -c '"$@"; exit $?' sh
    judge "Open MPI"
fi
if command -v mpiexec.hydra >/dev/null; then
    run 4 3 mpiexec.hydra -n 3
    run 5 3 mpiexec.hydra -n 3
    run 6 4 mpiexec.hydra -n 4 sh -c '"$@"; exit $?' sh
    run 7 2 mpiexec.hydra -n 2 timeout 50
    judge "MPICH"
    run 8 3 env SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=1 SLURM_STEP_NUM_NODES=1 mpiexec.hydra -launcher fork -n 3
    judge "MPICH in a step of one task"
fi

# ---- SLURM -----------------------------------------------------------------------------------------------------------

start_slurm() {
    host=$(hostname -s)
    mkdir -m 700 "$work/munge" "$work/state" "$work/spool"
    head -c 64 /dev/urandom >"$work/munge/key"
    chmod 600 "$work/munge/key"
    cat >"$SLURM_CONF" <<EOF
ClusterName=here
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$work/munge/socket
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd.pid
SlurmctldLogFile=$work/slurmctld.log
SlurmdLogFile=$work/slurmd.log
SlurmctldPort=$((20000 + $$ % 5000))
SlurmdPort=$((25000 + $$ % 5000))
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
ReturnToService=2
AccountingStorageType=accounting_storage/none
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=all Nodes=$host Default=YES OverSubscribe=FORCE:8 State=UP
EOF
    munged --key-file="$work/munge/key" --socket="$work/munge/socket" --pid-file="$work/munged.pid" \
        --log-file="$work/munged.log" --seed-file="$work/munge/seed" --force >"$work/start" 2>&1 || return 1
    slurmctld >>"$work/start" 2>&1 && slurmd >>"$work/start" 2>&1 || return 1
    for i in $(seq 100); do
        sinfo -h 2>/dev/null | grep -q idle && return 0
        sleep 0.1
    done
    return 1
}

if [ "$(id -u)" = 0 ] && command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v munged >/dev/null; then
    if start_slurm; then
        run 11 3 srun --overcommit -n 3
        run 12 3 srun --overcommit -n 3
        run 13 2 srun --overcommit -n 2 sh -c '"$@"; exit $?' sh
        judge "SLURM"
        run 14 2 srun --overcommit --mpi=pmi2 -n 2
        judge "SLURM with PMI"
        if command -v mpiexec.hydra >/dev/null; then
            run 15 4 salloc -Q --overcommit -n 1 mpiexec.hydra -n 4
            run 16 4 srun --overcommit -n 1 mpiexec.hydra -launcher fork -n 4
            judge "MPICH in an allocation of SLURM"
        fi
        if command -v mpirun.openmpi >/dev/null; then
            run 17 3 srun --overcommit -n 1 $ompi --mca plm isolated -np 3
            judge "Open MPI in a step of SLURM"
        fi
    else
        echo "SLURM is installed and does not start here; its variables are tested by check_launcher:"
        tail -n 3 "$work"/start "$work"/*.log
    fi
fi

[ "$checks" -gt 0 ] || { echo "no launcher is installed"; exit 77; }
echo "launchers: $checks jobs, $wrong went wrong"
[ "$wrong" = 0 ]
