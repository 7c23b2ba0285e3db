#!/bin/sh
# Prints the rows of a CSV as a Markdown table. Of usp_bench: a line a configuration, both passes side by side; of compare_torch.py: the
# same for each peer of a work; of compare_errors.py: its rows.
# usage: sh bench/table.sh FILE.csv
first=$(head -n 1 "$1")
if [ "${first%%,*}" = inputs ]; then
    awk '{ gsub(/,/, " | "); print "| " $0 " |" } NR == 1 { gsub(/[^|]+/, "---"); print "|" $0 "|" }' "$1"
    exit
fi
if [ "${first%%,*}" = work ]; then
    sed 's/"torch SDPA, \([^"]*\)"/\1/; s/"libusp, \([^"]*\)"/libusp \1/' "$1" | awk -F, '
NR == 1 { for (i = 1; i <= NF; i++) at[$i] = i; next }
{
    line = $at["work"] " | " ($at["peer"] == "" ? "" : $at["peer"] " ") "|"
    if (!(line in seen)) { seen[line] = 1; order[++n] = line }
    pass = $at["pass"]
    time[line, pass] = $at["usp_ms"]
    rate[line, pass] = $at["usp_tflops"]
    ratio[line, pass] = $at["ratio"]
}
function cell(line, pass) {
    text = sprintf(" %.3f | %.0f ", time[line, pass], rate[line, pass])
    return ratio[line, pass] != "" ? text sprintf("| %.2f ", ratio[line, pass]) : text "| "
}
END {
    print "| work | peer | fwd ms | TFLOP/s | x peer | bwd ms | TFLOP/s | x peer |"
    print "|---|---|---|---|---|---|---|---|"
    for (i = 1; i <= n; i++) print "| " order[i] cell(order[i], "forward") "|" cell(order[i], "backward") "|"
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
