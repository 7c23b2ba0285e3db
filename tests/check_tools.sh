#!/bin/sh
# check_tools.sh - runs usp_run, usp_bench and usp_plot on small cases and looks at files, output and exit statuses.
# Arguments: usp_run usp_bench usp_plot npy_tool [corrupt_layer library]. It needs no GPU; python3 is used if it is there.
# shellcheck disable=SC2086,SC2015,SC1003
set -u
[ $# -ge 4 ] || { echo "usage: check_tools.sh usp_run usp_bench usp_plot npy_tool [library]" >&2; exit 2; }
absolute() { # FILE
    [ -e "$1" ] || { echo "check_tools.sh: no $1" >&2; exit 2; }
    printf '%s/%s' "$(cd "$(dirname "$1")" && pwd)" "$(basename "$1")"
}
run=$(absolute "$1") && bench=$(absolute "$2") && plot=$(absolute "$3") && npy=$(absolute "$4") || exit 2
corrupt=
[ -z "${5:-}" ] || corrupt=$(absolute "$5") || exit 2
unset WORLD_SIZE OMPI_COMM_WORLD_SIZE SLURM_STEP_NUM_TASKS PMI_SIZE
dir=$(mktemp -d) && cd "$dir" || exit 2
trap 'rm -rf "$dir"' EXIT
trap 'echo "FAILED: out of time: $doing"; cat log; exit 1' TERM
failures=0 doing=start

fail()
{
    echo "FAILED: $*"
    failures=$((failures + 1))
}

# expect STATUS COMMAND...: the exit status; its output is in `log`.
expect()
{
    wanted=$1
    shift
    doing=$*
    "$@" >log 2>&1
    found=$?
    [ "$found" -eq "$wanted" ] || { fail "status $found, not $wanted: $*"; cat log; }
}

# refuse WORD COMMAND...: exit 1, one line on standard error that has the word, and no result file.
refuse()
{
    word=$1
    shift
    rm -f bad_out.npy
    expect 1 "$@" --out bad_out.npy
    [ "$(wc -l <log)" -eq 1 ] || { fail "not one sentence: $*"; cat log; }
    grep -q -- "$word" log || { fail "no '$word' in: $(cat log)"; }
    [ ! -e bad_out.npy ] || fail "a result in spite of an error: $*"
}

# mistake WORDS OPTIONS...: a wrong command line of usp_run: exit 64, the words in the one sentence above argp's hint.
mistake()
{
    words=$1
    shift
    expect 64 "$run" --q q.npy $ok --out bad_out.npy "$@"
    [ "$(grep -vc 'Try .* for more information' log)" -eq 1 ] || { fail "not one sentence: $*"; cat log; }
    grep -qF -- "$words" log || fail "no '$words' in: $(cat log)"
}

same()
{
    "$npy" compare "$1" "$2" "$3" >log 2>&1 || { fail "$1 and $2 differ: $(cat log)"; }
}

# ---- usp_run against a plain double loop, and over meshes --------------------------------------------------------------

batch=2 tokens=53 heads=4 kv=2 dim=16 value=24
make_inputs()
{
    "$npy" make q.npy "$1" 1 $batch $tokens $heads $dim || fail "make q"
    "$npy" make k.npy "$1" 2 $batch $tokens $kv $dim || fail "make k"
    "$npy" make v.npy "$1" 3 $batch $tokens $kv $value || fail "make v"
    "$npy" make g.npy "$1" 4 $batch $tokens $heads $value || fail "make g"
}

inputs="--q q.npy --k k.npy --v v.npy --dout g.npy"
grads="dq dk dv"

# meshes TOLERANCE RESULTS OPTIONS...: one rank, then four ranks in three meshes, all results alike. What is in `spread`
# (a layout) only the four ranks get.
spread=
meshes()
{
    tolerance=$1 results=$2
    shift 2
    outputs=
    for r in $results; do outputs="$outputs --$r one_$r.npy"; done
    expect 0 "$run" $inputs $outputs "$@"
    for mesh in "4 1" "2 2" "1 4"; do
        outputs=
        for r in $results; do outputs="$outputs --$r four_$r.npy"; done
        rm -f four_*.npy
        expect 0 "$run" -n 4 -u "${mesh% *}" -r "${mesh#* }" $inputs $outputs $spread "$@"
        for r in $results; do same "four_$r.npy" "one_$r.npy" "$tolerance"; done
    done
}

make_inputs f32
meshes 2e-6 "out lse $grads" --device cpu
"$npy" attend q.npy k.npy v.npy ref.npy softmax causal 1 || fail attend
same one_out.npy ref.npy 1e-5
same four_out.npy ref.npy 1e-5
meshes 2e-6 "out $grads" --device cpu --mask full --layout contiguous
"$npy" attend q.npy k.npy v.npy ref.npy softmax full 1 || fail attend
same four_out.npy ref.npy 1e-5
meshes 2e-6 "out $grads" --device cpu --layout stripe
meshes 2e-5 "out final-state $grads dinitial-state" --device cpu --kind linear --decay 0.9
"$npy" attend q.npy k.npy v.npy ref.npy linear causal 0.9 || fail attend
same four_out.npy ref.npy 1e-5
meshes 2e-5 "out final-state $grads" --device cpu --kind linear --decay alibi --state-exchange chain --recompute-state

# Layouts by lists, against one rank's zigzag: segments out of order, with strides, a rank with none; four documents, the
# shortest of one token. Causal linear attention takes no strides.
for spread in "--segments 40:13,0:10:2;1:10:2;;20:20" "--layout custom --segments 10:10,45:8:1;0:10;;20:25"; do
    meshes 1e-5 "out lse $grads" --device cpu
    meshes 1e-5 "out $grads" --device cpu --mask full
done
spread="--segments 10:10,45:8;0:10;;20:25"
meshes 1e-5 "out final-state $grads" --device cpu --kind linear --decay 0.9
packed="--documents 1,20,21,53"
for spread in "" "--layout documents" "--layout stripe" "--segments 40:13,0:10:2;1:10:2;;20:20"; do
    meshes 1e-5 "out lse $grads" --device cpu $packed
    meshes 1e-5 "out $grads" --device cpu --mask full $packed
done
for spread in "" "--layout documents"; do
    meshes 1e-5 "out final-state $grads" --device cpu --kind linear --decay 0.9 $packed
done
spread=
expect 0 "$run" -n 4 --verbose $inputs --out x.npy --device cpu --layout documents $packed
grep -q 'zigzag per document, 13 own tokens' log || fail "--layout documents is another layout: $(cat log)"

# The second document alone is the second one of a packed batch.
expect 0 "$run" -n 4 $inputs --out packed.npy --device cpu $packed
for x in q k v; do "$npy" cut $x.npy part_$x.npy 1 19 || fail "cut $x"; done
expect 0 "$run" --q part_q.npy --k part_k.npy --v part_v.npy --out part.npy --device cpu
"$npy" cut packed.npy part_ref.npy 1 19 || fail "cut packed"
same part.npy part_ref.npy 1e-5

# What only softmax has, together; a window of all tokens is none, and dropout hits the same pairs everywhere.
"$npy" make sinks.npy f32 9 $heads && "$npy" make dlse.npy f32 10 $batch $heads $tokens || fail "make sinks"
meshes 1e-5 "out lse max-logit dsinks $grads" --device cpu --window-left 9 --soft-cap 2 --slopes alibi --sinks sinks.npy \
    --dlse dlse.npy --dropout 0.2 --dropout-state 5,7
meshes 1e-5 "out $grads" --device cpu --mask full --window-left none --window-right 4 --route direct
meshes 1e-5 "out $grads" --device cpu --prefixes 0,3,1,20 $packed
meshes 1e-5 "out $grads" --device cpu --parents=-1,0,1,0 $packed
expect 0 "$run" $inputs --out window.npy --device cpu --window-left 53
expect 0 "$run" $inputs --out plain.npy --device cpu
same window.npy plain.npy 1e-6
expect 0 "$run" -n 4 --verbose $inputs --out x.npy --device cpu --window-left 9 --soft-cap 2 --slopes 0.5
grep -q 'window_left 9, .*soft_cap 2, slopes' log || fail "what is set is not described: $(cat log)"
spread="--segments 40:13,0:10:2;1:10:2;;20:20"
meshes 1e-5 "out $grads" --device cpu --kind linear --mask full
spread=

make_inputs f16
meshes 4e-3 "out $grads" --device cpu
"$npy" attend q.npy k.npy v.npy ref.npy softmax causal 1 || fail attend
same four_out.npy ref.npy 4e-3
make_inputs bf16
meshes 3e-2 "out $grads" --device cpu --dtype bf16
"$npy" attend q.npy k.npy v.npy ref.npy softmax causal 1 || fail attend
same four_out.npy ref.npy 3e-2

# States with their gradients, over meshes; then a sequence cut in two, its state handed over, is the whole.
make_inputs f32
"$npy" make s0.npy f32 7 $batch $heads $dim $value && "$npy" make ds.npy f32 8 $batch $heads $dim $value || fail "make s0"
linear="--device cpu --kind linear --decay 0.95,0.9,1,0.5"
meshes 2e-5 "out final-state $grads dinitial-state" $linear --initial-state s0.npy --dfinal-state ds.npy
for x in q k v; do
    "$npy" cut $x.npy early_$x.npy 0 20 && "$npy" cut $x.npy late_$x.npy 20 33 || fail "cut $x"
done
expect 0 "$run" --q early_q.npy --k early_k.npy --v early_v.npy --out early.npy --initial-state s0.npy \
    --final-state middle.npy $linear
expect 0 "$run" -n 3 --q late_q.npy --k late_k.npy --v late_v.npy --out late.npy --initial-state middle.npy \
    --final-state end.npy $linear
"$npy" cut one_out.npy early_ref.npy 0 20 && "$npy" cut one_out.npy late_ref.npy 20 33 || fail "cut out"
same early.npy early_ref.npy 1e-5
same late.npy late_ref.npy 1e-5
same end.npy one_final-state.npy 1e-5

# A run again is the same to the bit.
expect 0 "$run" -n 4 -u 2 $inputs --out again1.npy --dk again1k.npy --device cpu
expect 0 "$run" -n 4 -u 2 $inputs --out again2.npy --dk again2k.npy --device cpu
cmp -s again1.npy again2.npy || fail "out differs from run to run"
cmp -s again1k.npy again2k.npy || fail "dk differs from run to run"

# Keys of another length.
"$npy" make k2.npy f32 5 $batch 31 $kv $dim && "$npy" make v2.npy f32 6 $batch 31 $kv $value || fail "make cross"
"$npy" attend q.npy k2.npy v2.npy ref.npy softmax full 1 || fail attend
expect 0 "$run" -n 4 -u 2 --q q.npy --k k2.npy --v v2.npy --mask full --out cross.npy --device cpu
same cross.npy ref.npy 1e-5
for ranks in 1 4; do
    expect 0 "$run" -n $ranks --q q.npy --k k2.npy --v v2.npy --out cross_$ranks.npy --device cpu --alignment bottom-right \
        --documents 20,53 --key-documents 4,31
    expect 0 "$run" -n $ranks --q q.npy --k k2.npy --v v2.npy --out moved_$ranks.npy --device cpu --alignment bottom-right \
        --layout documents --documents 20,53 --key-documents 4,31
done
same cross_4.npy cross_1.npy 1e-5
same moved_1.npy cross_1.npy 1e-5
same moved_4.npy cross_1.npy 1e-5
expect 0 "$run" -n 3 --q q.npy --k k2.npy --v v2.npy --out dealt.npy --device cpu --alignment bottom-right \
    --documents 20,53 --key-documents 4,31 --segments "40:13,0:10:2;1:10:2;20:20" --key-segments "0:16:2;;1:15:2"
same dealt.npy cross_1.npy 1e-5
expect 1 "$run" -n 3 --q q.npy --k k2.npy --v v2.npy --out dealt.npy --device cpu --mask full \
    --segments "40:13,0:10:2;1:10:2;20:20" --key-segments "0:16:2;1:15:2"
expect 0 "$run" -n 2 --q k2.npy --k k2.npy --v v2.npy --out equal.npy --device cpu --segments "0:20;20:11" --key-segments "11:20;0:11"
expect 0 "$run" --q k2.npy --k k2.npy --v v2.npy --out equal_1.npy --device cpu
same equal.npy equal_1.npy 1e-5
expect 1 "$run" -n 3 --q q.npy --k k2.npy --v v2.npy --out dealt.npy --device cpu --mask full \
    --segments "40:13,0:10:2;1:10:2;20:20" --key-segments "0:16:2;1:15:2"
grep -qF -e "--key-segments has 2 lists for 3 ranks" log || fail "$(cat log)"

# ---- usp_run: files of other forms, against the same numbers in the plain one ------------------------------------------------

# forms DESCR FORTRAN ORDER PERMUTATION RESULT: inputs of this form; every result is one_*.npy as RESULT with that PERMUTATION.
forms()
{
    for x in q k v g; do "$npy" form $x.npy form_$x.npy "$1" "$2" "$4" || fail "form $x"; done
    expect 0 "$run" -n 4 -u 2 --device cpu --order "$3" --q form_q.npy --k form_k.npy --v form_v.npy --dout form_g.npy \
        --out form_out.npy --lse form_lse.npy --dq form_dq.npy --dk form_dk.npy --dv form_dv.npy
    for r in out $grads; do
        "$npy" form one_$r.npy form_ref.npy "$5" False "$4" || fail "form $r"
        same form_$r.npy form_ref.npy 2e-6
    done
}

meshes 2e-6 "out lse $grads" --device cpu
forms '<f4' False bhsd 0213 '<f4'
same form_lse.npy one_lse.npy 2e-6
forms '<f4' False sbhd 1023 '<f4'
same form_lse.npy one_lse.npy 2e-6
forms '>f4' False bshd 0123 '<f4'
forms '<f4' True bhsd 0213 '<f4'
forms '<f8' False bshd 0123 '<f8'
forms '>f8' True sbhd 1023 '<f8'
expect 0 "$run" --device cpu --order sbhd --q form_q.npy --k form_k.npy --v form_v.npy --out x.npy
[ "$(cat log)" = "usp_run: converted: --q big-endian float64 in Fortran order, --k big-endian float64 in Fortran order, \
--v big-endian float64 in Fortran order" ] || fail "not one line on what is converted: $(cat log)"
expect 0 "$run" --device cpu --q q.npy --k k.npy --v v.npy --out x.npy
[ ! -s log ] || fail "a plain file is said to be converted: $(cat log)"

# bf16 as JAX and ml_dtypes save it goes out as it came in.
make_inputs bf16
expect 0 "$run" $inputs --out one_out.npy --dq one_dq.npy --device cpu --dtype bf16
for x in q k v g; do "$npy" form $x.npy form_$x.npy '<V2' False 0123 || fail "form $x"; done
expect 0 "$run" --device cpu --q form_q.npy --k form_k.npy --v form_v.npy --dout form_g.npy --out form_out.npy --dq form_dq.npy
[ ! -s log ] || fail "V2 is said to be converted: $(cat log)"
for r in out dq; do
    "$npy" form one_$r.npy form_ref.npy '|V2' False 0123 || fail "form $r"
    same form_$r.npy form_ref.npy 0
    grep -qF "'|V2'" form_$r.npy || fail "$r is no V2"
done
make_inputs f32

# No tokens: results without any, and a state that is the one before the first token.
for x in q k v g; do "$npy" cut $x.npy no_$x.npy 0 0 || fail "cut $x"; done
for ranks in 1 4; do
    expect 0 "$run" -n $ranks --device cpu --q no_q.npy --k no_k.npy --v no_v.npy --dout no_g.npy --out no_out.npy \
        --lse no_lse.npy --dk no_dk.npy
    grep -qF "'shape': (2, 0, 4, 24, )" no_out.npy || fail "no tokens, -n $ranks: out has another shape"
    grep -qF "'shape': (2, 4, 0, )" no_lse.npy || fail "no tokens, -n $ranks: lse has another shape"
    grep -qF "'shape': (2, 0, 2, 16, )" no_dk.npy || fail "no tokens, -n $ranks: dk has another shape"
    expect 0 "$run" -n $ranks --kind linear --q no_q.npy --k no_k.npy --v no_v.npy --out no_out.npy --device cpu \
        --initial-state s0.npy --final-state no_state.npy
    same no_state.npy s0.npy 0
done
expect 0 "$run" --device cpu --mask full --q no_q.npy --k k.npy --v v.npy --out no_out.npy

# ---- usp_run: bad files -------------------------------------------------------------------------------------------------

ok="--k k.npy --v v.npy --device cpu"
"$npy" make three.npy f32 9 3 || fail "make three"
printf 'no array at all' >magic.npy
head -c 9 q.npy >short.npy
head -c 60 q.npy >header.npy
head -c 400 q.npy >data.npy
{ cat q.npy; printf x; } >long.npy
sed 's/<f4/|f4/' q.npy >unordered.npy
sed 's/<f4/|O /' q.npy >object.npy
"$npy" form q.npy beyond.npy '<f8' False 0123
printf '\0\0\0\0\0\0\340\176' | dd of=beyond.npy bs=1 seek=256 conv=notrunc 2>/dev/null # about 1e304
sed "s/(2, 53, 4, 16, )/(2, 53, 4, 16, 1)/" q.npy >five.npy
sed "s/(2, 53, 4, 16, )/(2, 9223372036854775807, 4, 16, )/;s/    \$//" q.npy >huge.npy
: >empty.npy
mkdir folder.npy
"$npy" form q.npy bhsd_q.npy '<f4' False 0213 && "$npy" form g.npy bhsd_v.npy '<f4' False 0213 || fail "form bhsd"
"$npy" make nobatch.npy f32 1 0 $tokens $heads $dim
"$npy" make q16.npy bf16 1 $batch $tokens $heads $dim
"$npy" make other.npy f32 1 $batch 7 $heads $dim
"$npy" make heads3.npy f32 1 $batch $tokens 3 $dim
refuse 'magic' "$run" --q magic.npy $ok
refuse 'magic' "$run" --q empty.npy $ok
refuse 'magic' "$run" --q short.npy $ok
refuse 'truncated' "$run" --q header.npy $ok
refuse 'truncated' "$run" --q data.npy $ok
refuse 'more than its shape' "$run" --q long.npy $ok
refuse "type '|f4', not f2, f4 or f8" "$run" --q unordered.npy $ok
refuse "type '|O '" "$run" --q object.npy $ok
refuse 'beyond float32' "$run" --q beyond.npy $ok
refuse 'no tokens, but the queries have 53' "$run" --q q.npy --k no_k.npy --v no_v.npy --mask full --device cpu
refuse 'its batch is 0, not from 1' "$run" --q nobatch.npy $ok
refuse '4, 53, 16.*, but .*2, 4, 53, 24.* for --dout' "$run" --order bhsd --q bhsd_q.npy --k bhsd_q.npy --v bhsd_v.npy \
    --dout bhsd_q.npy --dq x.npy --device cpu
refuse '.' "$run" --q five.npy $ok
refuse '.' "$run" --q huge.npy $ok
refuse 'regular file' "$run" --q folder.npy $ok
refuse 'regular file' "$run" --q /dev/zero $ok
refuse 'No such file' "$run" --q absent.npy $ok
refuse 'bf16' "$run" --q q16.npy $ok
refuse 'uint16' "$run" --q q.npy $ok --dtype bf16
refuse 'float16' "$run" --q q.npy $ok --dtype f16
refuse 'shape' "$run" --q q.npy --k k.npy --v v.npy --dout q.npy --dq x.npy --device cpu
refuse '.' "$run" --q other.npy $ok --kind linear
refuse '.' "$run" --q heads3.npy $ok
refuse 'ranks' "$run" -n 4 -u 3 --q q.npy $ok
refuse 'decay' "$run" --q q.npy $ok --kind linear --decay 0.9,0.8,0.7
refuse 'stripe' "$run" -n 2 -r 2 --q q.npy $ok --kind linear --layout stripe
refuse 'ends at 52, but there are 53' "$run" -n 2 --q q.npy $ok --layout documents --documents 20,52
refuse 'ends at 54, but there are 53' "$run" --q q.npy $ok --documents 54
refuse 'key_document_ends' "$run" --q q.npy --k other.npy --v other.npy --device cpu --mask full --layout documents --documents 53
refuse 'dropout is set' "$run" --q q.npy $ok --kind linear --dropout 0.5
refuse 'window_right is set' "$run" --q q.npy $ok --window-right 3
refuse 'dimensions, not 1' "$run" --q q.npy $ok --sinks q.npy
refuse 'shape \[3\], but \[4\] is needed' "$run" --q q.npy $ok --sinks three.npy
refuse 'slopes has 2 numbers' "$run" --q q.npy $ok --slopes 1,2
refuse '1 lists for 2 ranks' "$run" -n 2 --q q.npy $ok --segments 0:53
refuse '3 lists for 2 ranks' "$run" -n 2 --q q.npy $ok --segments '0:53;;'
refuse '3 of 53 tokens' "$run" -n 2 --q q.npy $ok --segments '0:20;20:30'
refuse 'token 19 is owned twice' "$run" -n 2 --q q.npy $ok --segments '0:20;19:34'
refuse 'leaves the tokens' "$run" -n 2 --q q.npy $ok --segments '0:20;20:34'
refuse 'leaves the tokens' "$run" --q q.npy $ok --segments '0:53:9223372036854775807'
refuse 'stride' "$run" -n 2 -r 2 --q q.npy $ok --kind linear --segments '0:27:2;1:26:2'
mistake 'whole number' --documents ''
mistake "'' is not a whole number" --documents 20,,53
mistake "'' is not a whole number" --documents 53,
mistake "'-5' is not" --documents=-5,53
mistake "'5x' is not" --documents 5x,53
mistake "'99999999999999999999' is not" --documents 99999999999999999999
refuse 'ascend' "$run" --q q.npy $ok --documents 20,10,53
mistake '2 numbers for 1 --documents' --documents 53 --parents=-1,0
mistake '1 numbers for 0 --documents' --prefixes 5
mistake "'5,' is not SEED,OFFSET" --dropout-state 5,
mistake 'needs --dout' --dlse dlse.npy
mistake 'needs --sinks' --dout q.npy --dsinks x.npy
mistake 'needs --kind softmax' --kind linear --slopes alibi
for segment in 5 5: :5 5:0 0:53:0 0:53: 0:53:1:1 0:-53 -1:5 0x1:5 ' 0:53' 0:53x 0:99999999999999999999; do
    mistake "'$segment' is not START:LENGTH" "--segments=$segment"
done
mistake "'' is not START:LENGTH" --segments '0:53,'
mistake "'' is not START:LENGTH" --segments ',0:53'
mistake 'needs --documents' --layout documents
mistake 'needs --segments' --layout custom
mistake 'excludes another --layout' --segments 0:53 --layout stripe
expect 1 "$run" --q q.npy $ok --out nowhere/out.npy
expect 1 "$run" --q q.npy $ok --out folder.npy
grep -q 'folder.npy: cannot write: Is a directory' log || fail "a folder as output: no reason"
expect 64 "$run" --q q.npy $ok --out q.npy
expect 64 "$run" --q q.npy $ok --out x.npy --lse x.npy
expect 64 "$run" --q q.npy $ok
expect 64 "$run" --q q.npy $ok --out x.npy --dq y.npy
expect 64 "$run" --q q.npy $ok --out x.npy --mask half
expect 64 "$run" --q q.npy $ok --out x.npy -n 0

# Outputs: through a link its target is written, with the mode that it had; a device or a pipe is written as it is; and a
# failure leaves what was there.
left() # what: no file beside an output
{
    [ -z "$(ls ./*.npy.*-* ./*.svg.*-* ./*.csv.*-* ./*.json.*-* 2>/dev/null)" ] || fail "temporary files are left: $1"
}
printf 'step,1 rank,2x2 <&>\n0,5.5,5.5\n1,4.5,4.6\n2,4.0,4.0\n' >loss.csv
mkdir place
printf old >place/old.npy
chmod 640 place/old.npy
ln -s place/old.npy link.npy
ln -s link.npy chain.npy
ln -s place/new.npy ahead.npy
ln -s loop.npy loop.npy
expect 0 "$run" --q q.npy $ok --out plain.npy
expect 0 "$run" --q q.npy $ok --out "$(printf '%0250d' 0).npy" # a name of 254 bytes, most systems take 255
for path in chain.npy ahead.npy; do
    expect 0 "$run" --q q.npy $ok --out $path
    [ -L $path ] || fail "$path is no link any more"
    cmp -s $path plain.npy || fail "$path does not lead to the result"
done
[ -L link.npy ] && [ ! -L place/old.npy ] && [ ! -L place/new.npy ] || fail "a link was replaced"
[ "$(stat -c %a place/old.npy)" = 640 ] || fail "mode $(stat -c %a place/old.npy), not 640"
[ "$(stat -c %a plain.npy)" = "$(printf %o $((0666 & ~0$(umask))))" ] || fail "another mode than a new file's"
expect 1 "$run" --q q.npy $ok --out loop.npy
[ -L loop.npy ] || fail "a link that leads nowhere was replaced"
expect 64 "$run" --q q.npy $ok --out ahead.npy --lse place/new.npy
mkfifo pipe.npy
timeout 20 cat pipe.npy >through.npy &
expect 0 "$run" --q q.npy $ok --out pipe.npy
wait
cmp -s through.npy plain.npy && [ -p pipe.npy ] || fail "a pipe was not written, or replaced"
ln -s /proc/self/fd/1 stdout # as /dev/stdout, which a tool that is wrong could replace
{ printf before; "$run" --q q.npy $ok --out stdout; printf after; } >out.log 2>log
{ printf before; cat plain.npy; printf after; } | cmp -s - out.log || fail "stdout was not written where it stands: $(cat log)"
mknod full c 1 7 2>/dev/null || [ "$(id -u)" -eq 0 ] || ln -s /dev/full full # never the machine's own as root
{ echo | cat >full; } 2>&1 | grep -q 'No space' || rm -f full
if [ -e full ]; then
    expect 1 "$run" --q q.npy $ok --out full
    grep -q 'full: cannot write: No space left' log || fail "a full device: no reason: $(cat log)"
    expect 1 "$plot" loss.csv -o full
    expect 1 "$plot" loss.csv -o full --x none
    expect 2 "$bench" --device cpu -b 64 -e 64 -n 1 --heads 1 --json full
    [ -c full ] || fail "a device was replaced"
fi
cp plain.npy kept.npy
expect 1 sh -c 'ulimit -f 4; trap "" XFSZ; exec "$@"' sh "$run" --q q.npy $ok --out kept.npy
grep -q 'kept.npy: cannot write: File too large' log || fail "no room: no reason: $(cat log)"
cmp -s kept.npy plain.npy || fail "a failure took away what was there"
left "after usp_run"

# No output over an input or another output, however it is spelled; gradients without the output.
mkdir sub
ln q.npy hard.npy
ln -s q.npy soft.npy
for path in ./q.npy "$dir/q.npy" sub/../q.npy hard.npy soft.npy; do
    expect 64 "$run" --q q.npy $ok --out "$path"
    grep -q -- '--q and --out are the same file' log || fail "$path is not seen to be q.npy: $(cat log)"
done
rm hard.npy soft.npy
for path in ./new.npy sub/../new.npy "$dir/new.npy"; do
    expect 64 "$run" --q q.npy $ok --out new.npy --lse "$path"
    grep -q -- '--out and --lse are the same file' log || fail "$path is not seen to be new.npy: $(cat log)"
done
expect 0 "$run" --q q.npy $ok --out new.npy --lse sub/new.npy
expect 0 "$run" $inputs --dk only_dk.npy --device cpu
same only_dk.npy again1k.npy 1e-5

# Ranks: as many as the mesh has, where nothing else says how many.
expect 0 "$run" -v --q q.npy $ok --out x.npy -u 2 -r 2
grep -q 'ulysses 2 (rank 0) x ring 2 (rank 0)' log || fail "-u 2 -r 2 is not 2 x 2: $(cat log)"
expect 0 "$run" -v --q q.npy $ok --out x.npy -r 3
grep -q 'ulysses 1 (rank 0) x ring 3 (rank 0)' log || fail "-r 3 is not 1 x 3: $(cat log)"
refuse '--ulysses 2 x --ring 3 is not the number of ranks, 4' "$run" -n 4 -u 2 -r 3 --q q.npy $ok
refuse '--ring 3 does not divide the number of ranks, 4' "$run" -n 4 -r 3 --q q.npy $ok
refuse '--ulysses 3 does not divide the number of ranks, 4' "$run" -n 4 -u 3 --q q.npy $ok
mistake 'make more than 4096 ranks' -u 4096 -r 2
mistake '-g excludes --device cpu' -g 2
if "$bench" --info | grep -q 'usable: 0'; then
    refuse 'no GPU is usable' "$run" --q q.npy $ok --device cuda
    refuse 'no GPU is usable' "$run" --q q.npy --k k.npy --v v.npy -g 2
    expect 2 "$bench" --device cuda
    grep -q 'no GPU is usable' log || fail "usp_bench without a GPU: $(cat log)"
fi

# Names and numbers that are none.
mistake "'foo' is none of softmax, linear" --kind foo
mistake "'foo' is none of zigzag, contiguous, stripe, documents, custom" --layout foo
mistake "'foo' is none of f32, f16, bf16" --dtype foo
for number in -1 1e-60 1e60 nan x; do mistake "'$number' is not a float32 from 0" "--scale=$number"; done
mistake "'0.96' is not a float32 from 0" --dropout 0.96
for number in -1 1.5 x 3G; do mistake "'$number' is not a whole number from -1" "--window-left=$number"; done
mistake "'foo' is none of auto|relay|direct|gathered" --route foo
mistake "'' is not a number in (0, 1]" --kind linear --decay 0.9,
mistake "'' is not a number in (0, 1]" --kind linear --decay ,0.9
mistake "'1e-60' is not a number in (0, 1]" --kind linear --decay 1e-60
mistake "'foo' is none of bshd, bhsd, sbhd" --order foo

for tool in "$run" "$bench" "$plot"; do
    expect 0 "$tool" --help
    grep -q -- '--help' log || fail "no help from $tool"
    grep -q '^ [ ]*$' log && fail "a line of blanks in the help of $tool"
    wanted=1
    [ "$tool" != "$bench" ] || wanted=2
    for option in --help --version; do
        expect $wanted sh -c '"$@" >/dev/full' sh "$tool" $option
        grep -q 'cannot write to standard output' log || fail "$tool $option: no reason: $(cat log)"
        expect $wanted sh -c '"$@" >&-' sh "$tool" $option
    done
    expect 0 "$tool" --version
    grep -Eq '[0-9]+\.[0-9]+\.[0-9]+' log || fail "no version from $tool"
done

# ---- usp_bench ----------------------------------------------------------------------------------------------------------

quick="--device cpu -n 3 -w 1 -m 1 --heads 4 --head-dim 16"
expect 0 "$bench" $quick -t 4 -b 64 -e 128 --layout all --kv-heads 2 --baseline -M -I --csv b.csv --json b.json --commit '"x"\'
rows=$(grep -vc '^#' log)
[ "$rows" -eq 88 ] || fail "$rows rows, not 88"
grep -q '# .*skipped: ' log || fail "linear attention on a striped ring was not skipped"
grep -q 'Out of bounds values : 0 OK' log || fail "no verdict line"
[ "$(wc -l <b.csv)" -eq 89 ] || fail "CSV has $(wc -l <b.csv) lines, not 89"
expect 0 "$bench" $quick -t 2 -b 64 -e 64 --plan
[ "$(grep -c '^#   plan: here [0-9.]* us, [0-9.]* of the time; 2 ranks 2x1 [0-9.]* 1x2 [0-9.]*; 4 ranks ' log)" -eq 4 ] || fail "no plan: $(cat log)"
expect 0 "$bench" $quick -b 64 -e 64 -d f16,bf16 --full --shared-memory
expect 0 "$bench" $quick -t 4 -b 256 -e 256 --layout all --documents 8:90 --max-documents 64 --window-left 20 --soft-cap 5 \
    --slopes alibi --sinks --dropout 0.1 --kv-heads 2 --kind softmax --csv masks.csv
grep -q ',causal window_left 20 documents 8:90,' masks.csv || fail "the mask is not in the CSV: $(cat masks.csv)"
expect 0 "$bench" $quick -t 2 -b 64 -e 64 --documents 20,1,7 --kind linear
expect 0 "$bench" $quick -t 2 -b 64 -e 64 --full --window-left none --window-right 5 --route gathered --kind softmax
expect 0 "$bench" $quick -t 2 -b 4096 -e 4096 --heads 1 --pass bwd -c 1
grep -q 'softmax.* 0$' log || fail "backward above the double-precision length was not checked"
expect 2 "$bench" $quick -t 4 -u 3 -b 64 -e 64
[ "$(wc -l <log)" -eq 1 ] || fail "more than one sentence about a mesh that cannot be: $(cat log)"
expect 2 "$bench" $quick -t 2 -G 1 -b 64 -e 64
grep -q "a graph needs a GPU for every rank" log || fail "a graph on the CPU was not refused"
expect 2 "$bench" $quick -t 2 -r 2 --kind linear --layout stripe -b 64 -e 64
grep -q 'every row was skipped: 2 rows: linear attention on the stripe layout' log || fail "no reason: $(cat log)"
expect 2 "$bench" $quick -t 2 -r 2 -u 1 --kind linear --layout stripe,zigzag --heads 8 --kv-heads 3,5 -b 64 -e 64 --pass fwd
grep -q 'skipped: 2 rows: .*kv_heads is 3.*; 2 rows: .*kv_heads is 5' log || fail "reasons are not grouped: $(cat log)"
expect 2 "$bench" $quick -b 64 -e 64 --csv nowhere/b.csv
expect 2 "$bench" $quick -b 64 -e 64 --json nowhere/b.json
[ "$(wc -l <log)" -eq 1 ] || fail "it ran before it saw that the JSON cannot be written: $(cat log)"
printf old >kept.csv
expect 2 sh -c '"$@" >/dev/full' sh "$bench" $quick -b 64 -e 64 --csv kept.csv
[ "$(cat kept.csv)" = old ] || fail "a run that failed before its first row took away a file"
expect 2 "$bench" $quick -t 2 -u 3 -b 64 -e 64 --csv kept.csv
[ "$(cat kept.csv)" = old ] || fail "a run that cannot be took away a file"
expect 0 "$bench" $quick -b 64 -e 64 --pass fwd --csv stdout
[ "$(grep -c '^64,1,4,' log)" -eq 2 ] && [ "$(grep -c '^  *64 ' log)" -eq 2 ] || fail "CSV on standard output: $(cat log)"
ln -s to.csv link.csv
expect 0 "$bench" $quick -b 64 -e 64 --pass fwd --csv link.csv
[ -L link.csv ] && [ "$(wc -l <to.csv)" -eq 3 ] || fail "a link was replaced, or its target not written"
left "after usp_bench"
expect 64 "$bench" $quick -b 64 -e 64 --json same --csv ./same
[ ! -e same ] || fail "a file was opened in spite of the mistake"
for end in '>/dev/full' '>&-'; do
    expect 2 sh -c "\"\$@\" $end" sh "$bench" $quick -b 64 -e 64 --csv table.csv
    grep -q 'cannot write to standard output' log || fail "$end: no reason: $(cat log)"
    [ ! -e table.csv ] || fail "$end: it ran without a table: $(cat table.csv)"
    expect 2 sh -c "\"\$@\" $end" sh "$bench" --info
done
expect 64 "$bench" --documents 9:8
expect 64 "$bench" --dropout 0.96
expect 64 "$bench" --kind foo
grep -q "'foo' is no list of softmax, linear, nor both" log || fail "no names of kinds: $(cat log)"
expect 64 "$bench" --device foo
grep -q "'foo' is none of auto, cpu, cuda" log || fail "no names of devices: $(cat log)"

# interrupt SIGNAL STATUS: ends a sweep that would take hours, once its first row is there. The sweep is in the foreground: a
# shell that runs no jobs has its children in the background ignore SIGINT.
interrupt()
{
    rm -f cut.json cut.csv log
    { until grep -q '^ .*64' log; do sleep 0.1; done; kill -s "$1" "$(cat process)"; } 2>/dev/null &
    doing="interrupt $1"
    sh -c 'echo $$ >process; exec "$@"' sh "$bench" --device cpu -n 1 -w 0 -b 64 -e 256K -f 4096 --heads 1 --json cut.json \
        --csv cut.csv >log 2>&1
    found=$?
    kill $! 2>/dev/null
    [ "$found" -eq "$2" ] || fail "status $found, not $2, after SIG$1: $(cat log)"
    grep -q "\"error\": \"ended by SIG$1\"" cut.json || fail "SIG$1: no word of it in the JSON: $(cat cut.json)"
    [ "$(grep -c '"status": "ok"' cut.json)" -eq $(($(wc -l <cut.csv) - 1)) ] || fail "SIG$1: JSON and CSV differ"
    grep -q '"status": "ok"' cut.json || fail "SIG$1: no row"
    ! command -v python3 >/dev/null || python3 -m json.tool cut.json >log || fail "SIG$1: $(cat log)"
}
interrupt INT 130
interrupt TERM 143
sh -c 'kill -s HUP $$' 2>/dev/null || interrupt HUP 129 # unless nohup has it ignored
left "after signals"
expect 64 "$bench" -b 2K -e 1K
expect 64 "$bench" -t 2 -g 2
expect 64 "$bench" --kind quadratic
expect 64 "$bench" --layout custom
expect 0 "$bench" --info
if [ -n "$corrupt" ]; then
    cp "$corrupt" corrupt.so # LD_PRELOAD cannot name a folder with a space
    expect 1 env LD_PRELOAD=./corrupt.so ASAN_OPTIONS=verify_asan_link_order=0 \
        "$bench" --device cpu -n 3 -m 1 --heads 2 --head-dim 16 -b 64 -e 64 --pass fwd --json wrong.json
    grep -q 'FAILED' log || fail "a wrong result was not reported"
    grep -q '"status": "wrong"' wrong.json || fail "a wrong result is not wrong in the JSON"
    grep -q '^  "wrong": [1-9]' wrong.json || fail "no wrong elements in the JSON's head"
fi
if command -v python3 >/dev/null; then
    python3 - <<'PY' || fail "JSON or CSV is not what it should be"
import csv, json
document = json.load(open("b.json"), parse_constant=lambda name: 1 / 0)
rows = [r for r in document["results"] if r["status"] == "ok"]
table = list(csv.DictReader(open("b.csv")))
assert document["schema"] == 2 and document["error"] is None and document["commit"] == '"x"\\' and document["ranks"] == 4
assert document["timed"] == document["checked"] == 88 and document["wrong"] == 0
assert len(rows) == len(table) == 88 and len(document["results"]) > 88
for row, line in zip(rows, table):
    assert row["wrong"] == 0 and row["samples"] > 0 and row["speedup"] > 0
    assert row["seq"] == int(line["seq"]) and row["pass"] == line["pass"]
    assert abs(row["time_us"]["median"] - float(line["time_us"])) < 0.01
    assert row["time_us"]["min"] <= row["time_us"]["median"] <= row["time_us"]["p99"] <= row["time_us"]["max"]
PY
fi

# The bar fits a terminal that becomes narrower and wider, and takes up the lines on which its old self then stands.
if command -v python3 >/dev/null; then
    python3 - "$bench" <<'PY' || fail "the progress bar on a terminal that changes"
import fcntl, os, pty, re, signal, struct, sys, termios
signal.alarm(60)
def resize(fd, columns):
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
command = [sys.argv[1]] + "--device cpu -b 64 -e 64 -n 1000000 -m 1 --budget 0 --heads 1 --kind softmax --pass fwd".split()
child, terminal = pty.fork()
if child == 0:
    resize(2, 100)
    os.dup2(os.open("/dev/null", os.O_WRONLY), 1)
    os.environ["TERM"] = "xterm"
    os.execv(command[0], command)
drawn, seen = [], b""
for columns in (100, 30, 7, 120):
    resize(terminal, columns)
    start = len(drawn)
    while len(drawn) < start + 4: # one may have been on its way, one is not complete
        seen += os.read(terminal, 4096)
        drawn = re.findall(rb"(?:\x1b\[(\d+)A)?\r\x1b\[J([^\r]*?)(?=\x1b\[\d+A|\r)", seen)
    lines = [(int(up or 0), len(re.sub(rb"\x1b\[\d*m", b"", text))) for up, text in drawn[max(start - 1, 0):]]
    for (_, before), (up, length) in zip(lines[1:], lines[2:]):
        assert length < columns and up == (before - 1) // columns, (columns, lines)
os.kill(child, signal.SIGKILL)
os.waitpid(child, 0)
PY
fi

# ---- usp_plot -----------------------------------------------------------------------------------------------------------

expect 0 "$plot" loss.csv -o loss.svg --title 'Loss'
expect 0 "$plot" b.csv -o lines.svg --where pass=fwd --where layout=zigzag
expect 0 "$plot" b.csv -o bars.svg --where seq=64 --where layout=zigzag
expect 0 "$plot" b.csv -o heat.svg --type heatmap --where kind=softmax --where pass=fwd
grep -q '2x2 &lt;&amp;&gt;' loss.svg || fail "names are not escaped"
[ "$(grep -c '<polyline' loss.svg)" -eq 2 ] || fail "not two curves"
[ "$(grep -c '<polyline' lines.svg)" -eq 6 ] || fail "not six lines"
[ "$(grep -c 'fill="rgb' heat.svg)" -eq 3 ] || fail "not three cells"
if command -v python3 >/dev/null; then
    python3 -c 'import sys, xml.dom.minidom as x; [x.parse(f) for f in sys.argv[1:]]' ./*.svg || fail "not XML"
fi
# What fails, or would, leaves what was there.
printf old >kept.svg
expect 1 "$plot" b.csv --where pass=none -o kept.svg
expect 1 sh -c 'ulimit -f 1; trap "" XFSZ; exec "$@"' sh "$plot" b.csv -o kept.svg
grep -q 'kept.svg: cannot write: File too large' log || fail "no room: no reason: $(cat log)"
[ "$(cat kept.svg)" = old ] || fail "a failure took away what was there"
ln -s kept.svg link.svg
expect 0 "$plot" b.csv -o link.svg
[ -L link.svg ] && grep -q '</svg>' kept.svg || fail "a link was replaced, or its target not written"
expect 0 "$plot" b.csv -o stdout
cmp -s log kept.svg || fail "stdout has another picture"
[ "$(readlink stdout)" = /proc/self/fd/1 ] || fail "the link to standard output was replaced"
left "after usp_plot"

# Several files: every series keeps its file, or its path where names are alike.
mkdir one two
for n in 1 2 4; do
    printf 'seq,kind,ulysses,ring,tflops_per_rank\n1024,softmax,1,%s,%s.5\n' $n $n >ranks$n.csv
    printf 'seq,kind,tflops_per_rank\n1024,softmax,%s\n2048,softmax,1\n' $n >sweep$n.csv
done
expect 0 "$plot" ranks1.csv ranks2.csv ranks4.csv -o three.svg
[ "$(grep -c '<rect .*rx=' three.svg)" -eq 3 ] || fail "not a bar for each of three files"
for bar in '>ranks1 R1<' '>ranks2 R2<' '>ranks4 R4<' '>4.5<' '>ranks1.csv and 2 more<'; do
    grep -q -- "$bar" three.svg || fail "no $bar among the bars of three files"
done
expect 0 "$plot" sweep1.csv sweep2.csv sweep4.csv -o three.svg
[ "$(grep -c '<polyline' three.svg)" -eq 3 ] || fail "not a line for each of three files"
cp loss.csv one/loss.csv
cp loss.csv two/loss.csv
expect 0 "$plot" one/loss.csv two/loss.csv loss.csv -o three.svg
[ "$(grep -c '<polyline' three.svg)" -eq 6 ] || fail "not six curves of three files"
grep -q '>two/loss.csv 1 rank<' three.svg || fail "files of one name are not told apart"
expect 64 "$plot" loss.csv sub/../loss.csv
grep -q 'loss.csv is given twice' log || fail "a file twice: $(cat log)"
expect 1 "$plot" loss.csv --type bars
grep -q "3 rows are '1 rank', a bar shows one" log || fail "rows that no bar shows: $(cat log)"

# Cells in quotes, a byte-order mark, and numbers of any size.
printf '\357\273\277"step","a, ""b""",c\r\n0,"5.5",5\r\n1,4.5,"4"\r\n' >quoted.csv
expect 0 "$plot" quoted.csv -o quoted.svg
grep -q '>a, "b"<' quoted.svg && [ "$(grep -c '<circle' quoted.svg)" -eq 4 ] || fail "quoted cells are not read"
for line in '0,"1' '0,"1"2' '"0,1'; do
    printf 'step,loss\n%s\n' "$line" >quote.csv
    expect 1 "$plot" quote.csv
    grep -q 'row 1 has a quote without its end' log || fail "$line: $(cat log)"
done
for number in 1e308 -1e308; do
    printf 'step,loss\n0,1\n1,%s\n' $number >large.csv
    expect 1 "$plot" large.csv -o large.svg
    grep -q "'loss': $(printf %g $number) is too large to draw" log || fail "$number: $(cat log)"
done
printf 'ulysses,ring,tflops_per_rank\n1,1,1e308\n1,1,1e308\n' >large.csv
expect 1 "$plot" --type heatmap large.csv
for points in '0,1e300 1,-1e300' '10000000000000000,1 10000000000000002,2' '0,5e-324 5e-324,1' '-1e300,0 1e300,0' '1,1 1,1'; do
    { echo step,loss; printf '%s\n' $points; } >range.csv
    expect 0 "$plot" range.csv
    [ "$(grep -c '<circle' log)" -eq 2 ] && [ "$(grep -c '<text' log)" -lt 40 ] && ! grep -Eqi '[ "](-?nan|-?inf)' log ||
        fail "$points: $(cat log)"
    { echo seq,tflops_per_rank; printf '%s\n' $points; } >range.csv
    expect 0 "$plot" range.csv --type line
    [ "$(grep -c '<circle' log)" -eq 2 ] && [ "$(grep -c '<text' log)" -lt 40 ] && ! grep -Eqi '[ "](-?nan|-?inf)' log ||
        fail "$points, by seq: $(cat log)"
done

expect 1 "$plot" absent.csv
expect 1 "$plot" b.csv --y nothing
printf 'a,b\n1\n' >ragged.csv
expect 1 "$plot" ragged.csv
expect 1 "$plot" b.csv --where pass=none
expect 1 "$plot" b.csv --where foo=1
grep -q "b.csv: has no column 'foo'" log || fail "an unknown column is not named: $(cat log)"
cp b.csv copy.csv
for path in b.csv ./b.csv "$dir/b.csv"; do
    expect 64 "$plot" loss.csv b.csv -o "$path"
    cmp -s b.csv copy.csv || fail "$path was overwritten"
done
expect 64 "$plot" b.csv --type foo
grep -q "'foo' is none of auto, line, bars, heatmap" log || fail "no names of charts: $(cat log)"
expect 1 sh -c '"$@" >/dev/full' sh "$plot" b.csv

[ "$failures" -eq 0 ] || { echo "$failures failures"; exit 1; }
echo "all right"
