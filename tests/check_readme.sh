#!/bin/sh
# Compiles and runs the example in README.md, as a reader would.
# usage: check_readme.sh README INCLUDE LIBRARY
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
awk '/^```c$/ { inside = 1; next } /^```$/ { inside = 0 } inside' "$1" >"$work/example.c"
cc -std=c11 -D_DEFAULT_SOURCE -Wall -Wextra -Werror -I"$2" "$work/example.c" "$3" -lpthread -o "$work/example"
library=$(dirname "$3")
LD_LIBRARY_PATH="$library${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" "$work/example" | sort >"$work/said"
printf 'rank 0: 500 tokens, success\nrank 1: 500 tokens, success\n' | diff - "$work/said"
echo "readme: ok"
