# gpus.sh - for scripts that begin with `. gpus.sh`: $gpus, how many GPUs their processes may use, and need_gpus.
gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
[ -z "${CUDA_VISIBLE_DEVICES:-}" ] || gpus=$(echo "$CUDA_VISIBLE_DEVICES" | tr , '\n' | grep -c .)

# need_gpus N: leaves the script as a skipped test where there are fewer.
need_gpus() {
    [ "$gpus" -ge "$1" ] && return
    echo "skipped: needs $1 or more GPUs, here are $gpus"
    exit 77
}
