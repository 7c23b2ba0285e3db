#!/bin/sh
# Prints the rows of a CSV of usp_bench or compare_torch.py as a Markdown table: a line a configuration, both passes side by side.
# usage: sh bench/table.sh FILE.csv
if [ "$(head -c 5 "$1")" = work, ]; then
    sed 's/"[^"]*"/peer/' "$1" | awk -F, '
NR == 1 { for (i = 1; i <= NF; i++) at[$i] = i; next }
{
    work = $at["work"]
    if (!(work in seen)) { seen[work] = 1; order[++n] = work }
    pass = $at["pass"]
    time[work, pass] = $at["usp_ms"]
    rate[work, pass] = $at["usp_tflops"]
    ratio[work, pass] = $at["ratio"]
}
function cell(work, pass) {
    text = sprintf("| %.3f | %.0f ", time[work, pass], rate[work, pass])
    return ratio[work, pass] != "" ? text sprintf("| %.2f ", ratio[work, pass]) : text "| "
}
END {
    print "| work | fwd ms | TFLOP/s | x cuDNN | bwd ms | TFLOP/s | x cuDNN |"
    print "|---|---|---|---|---|---|---|"
    for (i = 1; i <= n; i++) print "| " order[i] " " cell(order[i], "forward") cell(order[i], "backward") "|"
}'
    exit
fi
awk -F, '
NR == 1 { for (i = 1; i <= NF; i++) at[$i] = i; next }
{
    key = $at["kind"] "," $at["heads"] ":" $at["kv"] "," $at["seq"] "," $at["ulysses"] "," $at["ring"]
    if (!(key in seen)) { seen[key] = 1; order[++n] = key }
    pass = $at["pass"]
    time[key, pass] = $at["time_us"] / 1000
    rate[key, pass] = $at["tflops_per_rank"]
    if ("speedup" in at) gain[key, pass] = $at["speedup"]
    wrong += $at["wrong"]
}
function cell(key, pass) {
    if (!((key, pass) in time)) return "| | | "
    text = sprintf("| %.3f | %.1f ", time[key, pass], rate[key, pass])
    return gain[key, pass] != "" ? text sprintf("| %.2f ", gain[key, pass]) : text "| "
}
END {
    print "| kind | heads:kv | tokens | ulysses x ring | fwd ms | TFLOP/s a rank | x one rank | bwd ms | TFLOP/s a rank | x one rank |"
    print "|---|---|---|---|---|---|---|---|---|---|"
    for (i = 1; i <= n; i++) {
        split(order[i], part, ",")
        print "| " part[1] " | " part[2] " | " part[3] " | " part[4] " x " part[5] " " cell(order[i], "fwd") cell(order[i], "bwd") "|"
    }
    if (wrong) { print "wrong results: " wrong; exit 1 }
}' "$1"
