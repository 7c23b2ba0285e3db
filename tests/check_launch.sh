#!/bin/sh
# Starts small shell programs as ranks: what they find in the environment, and what usp_launch makes of how they end.
# usage: check_launch.sh USP_LAUNCH
set -eu
launch=$1
unset USP_JOB_TOKEN
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
fail() { echo "FAIL: $*" >&2; cat "$work/out" "$work/err" >&2 || true; exit 1; }
doing=start
trap 'fail "out of time: usp_launch $doing"' TERM

# expect STATUS ARGUMENTS...: the launcher's status; its output in out and err, the seconds it took in $took.
expect() {
    wanted=$1 status=0 begin=$(date +%s)
    shift
    doing=$*
    "$launch" "$@" >"$work/out" 2>"$work/err" || status=$?
    took=$(($(date +%s) - begin))
    [ "$status" = "$wanted" ] || fail "usp_launch $*: status $status, not $wanted"
}
says() { grep -q -- "$2" "$work/$1" || fail "'$2' is not in the launcher's $1"; }

# Each rank has its own number, and all the same meeting point.
expect 0 -n 3 --port 23456 sh -c 'echo $RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT'
sort "$work/out" >"$work/ranks"
printf '%s\n' '0 0 3 3 127.0.0.1 23456' '1 1 3 3 127.0.0.1 23456' '2 2 3 3 127.0.0.1 23456' | cmp -s - "$work/ranks" ||
    fail "the ranks' environment"
expect 0 sh -c 'test $WORLD_SIZE = 1 && test $MASTER_PORT -gt 0'

# Each job has a token of its own, the same on all ranks; one that is there already stays.
expect 0 -n 2 sh -c 'echo $USP_JOB_TOKEN'
sort -u "$work/out" >"$work/first"
expect 0 -n 2 sh -c 'echo $USP_JOB_TOKEN'
sort -u "$work/out" >"$work/second"
cat "$work/first" "$work/second" >"$work/out"
[ "$(grep -cE '^[0-9a-f]{32}$' "$work/out")" = 2 ] || fail "the tokens are not two random numbers"
cmp -s "$work/first" "$work/second" && fail "two jobs have one token"
USP_JOB_TOKEN=mine expect 0 sh -c 'test $USP_JOB_TOKEN = mine'

# Arguments go on as they are, options of the program too.
expect 0 sh -c 'test "$1" = "a b" && test "$2" = -n' sh 'a b' -n

# The status is that of the rank that failed; without --kill the others go on to their end.
expect 7 -n 3 sh -c 'if [ $RANK = 1 ]; then exit 7; fi; sleep 1; echo done $RANK'
says err 'rank 1 ended with status 7'
[ "$(grep -c done "$work/out")" = 2 ] || fail "the other ranks did not go on"
expect 137 -n 2 sh -c 'if [ $RANK = 1 ]; then kill -KILL $$; fi'
says err 'rank 1 was ended by signal 9'
expect 127 "$work/no-such-program"
says err 'cannot start'

# With --kill one failure ends the others; so does the time limit, and it is not the rank's own status.
expect 3 -n 3 --kill sh -c 'if [ $RANK = 2 ]; then exit 3; fi; exec sleep 20'
[ "$took" -lt 15 ] || fail "--kill took $took s"
for option in -t --time=; do
    expect 124 -n 2 "${option}1" sleep 20
    [ "$took" -lt 15 ] || fail "the limit of 1 s took $took s"
    says err 'rank 0 had to be killed'
    says err 'rank 1 had to be killed'
done
expect 0 -n 2 -t 20 true

# A signal is passed on to the ranks.
doing='and a signal'
"$launch" -n 2 sh -c 'trap "exit 5" TERM; touch "$0.$RANK"; for i in $(seq 300); do sleep 0.1; done' "$work/ready" 2>"$work/err" &
process=$!
until [ -e "$work/ready.0" ] && [ -e "$work/ready.1" ]; do sleep 0.1; done
kill -TERM "$process"
status=0
wait "$process" || status=$?
[ "$status" = 5 ] || fail "SIGTERM: status $status, not that of the ranks, 5"

# Help and version; options that are wrong.
for option in --help '-?' -h --usage; do expect 0 "$option"; done
expect 0 --help
for option in --ranks --time --port --kill --version; do says out "$option"; done
expect 0 --version
says out '^usp_launch (libusp) [0-9]'
status=0
"$launch" --help >/dev/full 2>"$work/err" || status=$?
[ "$status" = 1 ] || fail "--help to a full disk: status $status, not 1"
for wrong in '-n 0' '-n 1.5' '-n 100000' '-t 0' '--port 70000' '--no-such-option'; do
    expect 64 $wrong true # EX_USAGE
done
expect 64 -n 2
says err 'which program'
echo "launch: ok"
