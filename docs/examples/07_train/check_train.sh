#!/bin/sh
# check_train.sh TRAIN TEXT... - trains on every mesh with the same seed and compares the loss curves.
# It proves that the model learns on every mesh, that meshes agree, that a run repeats bit for bit and that a planted error
# is seen.
#
# STEPS, BATCH, TOKENS in the environment choose another run: BATCH=4 is that of the quick start.
set -eu
train=$1
shift
size="--steps ${STEPS:-200} --batch ${BATCH:-2} --tokens ${TOKENS:-512} --evaluate 50"
curves=$(mktemp -d)
trap 'rm -rf "$curves"' EXIT
failures=0

# run NAME OPTION... : the loss curve goes to $curves/NAME
run() {
    name=$1
    shift
    # shellcheck disable=SC2086
    "$train" $size --csv "$curves/$name" "$@" > "$curves/$name.log" 2>&1 || { cat "$curves/$name.log"; exit 1; }
}

# verdict EXPECTED GOT TEXT
verdict() {
    if [ "$1" = "$2" ]; then word=ok; else word=WRONG; failures=$((failures + 1)); fi
    printf '%-5s %s\n' "$word" "$3"
}

# difference A B: the largest relative difference of B to A in the first 50 steps, that of the last held-out loss, and
# whether they are within 1e-4 and 5e-3
difference() {
    paste -d, "$curves/$1" "$curves/$2" | awk -F, '
        function apart(a, b) { return (a > b ? a - b : b - a) / a }
        NR > 1 && $1 != $4 { exit 1 }
        NR > 1 && $1 <= 50 && apart($2, $5) > early { early = apart($2, $5) }
        NR > 1 && $3 != "" { last = apart($3, $6) }
        END { printf("%.1e %.1e %s\n", early, last, NR > 50 && early <= 1e-4 && last <= 5e-3 ? "same" : "differ") }'
}

# compare EXPECTED A B TEXT
compare() {
    read -r early last word <<END
$(difference "$2" "$3")
END
    verdict "$1" "$word" "$4: first 50 steps within $early, final held-out loss within $last"
}

# refuse STATUS SENTENCE ARGUMENT... : a mistake is told in one sentence.
refuse() {
    status=0
    sentence=$2
    expected=$1
    shift 2
    "$train" "$@" > "$curves/log" 2>&1 || status=$?
    if [ "$status: $(cat "$curves/log")" = "$expected: train: $sentence" ]; then word=told; else word=$(cat "$curves/log"); fi
    verdict told "$word" "train $*: $sentence"
}

refuse 1 "cannot read $curves/nosuch: No such file or directory" "$curves/nosuch"
refuse 1 "cannot read $curves/nosuch: No such file or directory" "$1" "$curves/nosuch"
refuse 1 'too little text: 16 KiB are the least; of folders only files named *.md count' /dev/null
refuse 1 "cannot write $curves/nosuch/a: No such file or directory" --csv "$curves/nosuch/a" "$@"
refuse 2 "unknown option '--bogus'; --help lists all" --bogus
refuse 2 "unknown option '--bogus'; --help lists all" --bogus 3
refuse 2 "unknown option '--bogus'; --help lists all" "$1" --bogus
refuse 2 "--steps wants a whole number of at least 1, not 'x'" "$1" --steps x
refuse 2 '--steps wants a whole number of at least 1' --steps
refuse 2 "--steps wants a whole number of at least 1, not 'x'" --steps x
refuse 2 '--csv wants a file' --csv
refuse 2 "--plant wants position or label, not 'x'" --plant x

run one "$@"
run 4x1 -u 4 "$@"
run 2x2 -u 2 -r 2 "$@"
run 1x4 -r 4 "$@"
run copies -u 2 -d 2 "$@"
# The first steps show a planted error, and that a run repeats. Options behind the texts are options.
short='--steps 60 -u 2 -r 2'
run short $short "$@"
run again "$@" $short
run position $short --plant position "$@"
run label $short --plant label "$@"

compare same one 4x1 'ulysses 4, ring 1'
compare same one 2x2 'ulysses 2, ring 2'
compare same one 1x4 'ulysses 1, ring 4'
compare same one copies '2 data copies of ulysses 2, ring 1'
compare differ short position 'planted: positions one too far'
compare differ short label 'planted: labels shifted after sharding'
if cmp -s "$curves/short" "$curves/again"; then word=same; else word=differ; fi
verdict same "$word" 'the same mesh again, bit for bit'
for name in one 4x1 2x2 1x4 copies; do
    read -r word first last <<END
$(awk -F, 'NR == 2 { first = $3 } NR > 1 && $3 != "" { last = $3 }
    END { print (first > 5.3 && first < 5.7 && last < 2.8 ? "learns" : "fails"), first, last }' "$curves/$name")
END
    verdict learns "$word" "$name: held-out loss from $first to $last, of about 5.5 to less than 2.8"
done
exit $((failures > 0))
