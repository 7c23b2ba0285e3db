#!/bin/sh
# Follows README.md as a reader would: compiles its example, runs the commands of its console blocks, and compares what they
# print. Where NumPy is missing, npy_tool makes the tensors.
# usage: check_readme.sh README INCLUDE LIBRARY USP_LAUNCH NPY_TOOL
set -eu
absolute() { printf '%s/%s' "$(cd "$(dirname "$1")" && pwd)" "$(basename "$1")"; }
readme=$(absolute "$1") include=$(absolute "$2") library=$(absolute "$3") npy=$(absolute "$5")
PATH=$(dirname "$(absolute "$4")"):$PATH
LD_LIBRARY_PATH=$(dirname "$library")${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export PATH LD_LIBRARY_PATH
unset RANK OMPI_COMM_WORLD_RANK SLURM_PROCID
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
ln -s "$include" include # a name without blanks
ln -s "$library" libusp.so

# block LANGUAGE: all fenced blocks of that language.
block() { awk -v begin="\`\`\`$1" '$0 == begin { inside = 1; next } $0 == "```" { inside = 0 } inside' "$readme"; }
block c >example.c
cc -std=c11 -Wall -Wextra -Werror -Iinclude -fsyntax-only example.c
lines=$(wc -l <example.c)
[ "$lines" -gt 10 ] && [ "$lines" -le 32 ] || { echo "FAIL: the example has $lines lines"; exit 1; }

# The reader has installed libusp, and NumPy.
mkdir bin
PATH=$work/bin:$PATH
printf '#!/bin/sh\necho -Iinclude ./libusp.so\n' >bin/pkg-config
python3 -c 'import numpy' 2>/dev/null ||
    printf '#!/bin/sh\nfor x in q k v; do "%s" make $x.npy f32 1 1 1000 8 64; done\n' "$npy" >bin/python3
chmod +x bin/*
hash -r
block console | sed -n 's/^\$ //p' >commands
block console | grep -v '^\$ ' >wanted
. ./commands >said
diff wanted said
echo "readme: ok, $(wc -l <commands) commands"
