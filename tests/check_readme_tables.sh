#!/bin/sh
# The tables in README.md are what bench/table.sh makes of the result files that they name.
# usage: check_readme_tables.sh SOURCE
set -eu
cd "$1"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
sed -n 's/^<!-- table \(.*\) -->$/\1/p' README.md >"$work/files"
while read -r file; do
    awk -v mark="<!-- table $file -->" '$0 == mark { inside = 1; next } /^<!-- end -->$/ { inside = 0 } inside' README.md >"$work/there"
    sh bench/table.sh "$file" | diff "$work/there" - || { echo "FAIL: README.md's table is not that of $file"; exit 1; }
done <"$work/files"
echo "readme tables: $(wc -l <"$work/files") ok"
