#!/bin/sh
# The tables in README.md and docs/numerics.md are what bench/table.sh makes of the result files that they name; docs/testing.md has the
# commands that made those of usp_bench, and README.md the commit.
# usage: check_readme_tables.sh SOURCE
set -eu
cd "$1"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for page in README.md docs/numerics.md; do
    sed -n "s@^<!-- table \(.*\) -->\$@$page \1@p" "$page"
done >"$work/files"
while read -r page file; do
    awk -v mark="<!-- table $file -->" '$0 == mark { inside = 1; next } /^<!-- end -->$/ { inside = 0 } inside' "$page" >"$work/there"
    sh bench/table.sh "$file" | diff "$work/there" - || { echo "FAIL: the table of $page is not that of $file"; exit 1; }
    json=${file%.csv}.json
    [ -e "$json" ] || continue # of compare_torch.py or compare_errors.py
    commit=$(sed -n 's/^  "commit": "\(.*\)",$/\1/p' "$json")
    grep -q "commit $commit" README.md || { echo "FAIL: README.md does not name $commit, of $json"; exit 1; }
    sed -n 's/^  "command": ".*usp_bench \(.*\)",$/\1/p' "$json" |
        sed 's/--quiet //; s/--\(commit\|json\|csv\) [^ ]* *//g' >"$work/made"
    common=$(sed -n "s/^common='\(.*\)'$/\1/p" docs/testing.md)
    sed -n "s/^build.*usp_bench \$common \(.*\) --csv $(basename "$file")$/$common \1/p" docs/testing.md | diff "$work/made" - ||
        { echo "FAIL: docs/testing.md's command is not that of $json"; exit 1; }
done <"$work/files"
echo "readme tables: $(wc -l <"$work/files") ok"
