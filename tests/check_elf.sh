#!/bin/sh
# check_elf.sh FORTIFIED LIBRARY [TOOL...] - that the library and the tools are built as hardened as meson.build asks for:
# read-only relocations bound at start, no executable stack, guarded frames, checked libc calls, tools at any address.
set -u
command -v readelf >/dev/null || { echo "no readelf (binutils) here"; exit 77; }
fortified=$1 library=$2
shift 2
failures=0

# expect FILE WHAT PATTERN READELF-FLAG: a line of readelf's matches.
expect() {
    readelf -W "$4" "$1" | grep -Eq "$3" && return
    echo "FAILED: $1 has no $2"
    failures=$((failures + 1))
}

for file in "$library" "$@"; do
    expect "$file" "read-only relocations" GNU_RELRO -l
    expect "$file" "binding at start" "BIND_NOW|Flags:.* NOW" -d
    expect "$file" "stack that is not executable" "GNU_STACK .* RW  " -l
    expect "$file" "guarded frame" __stack_chk_fail -s
done
for tool in "$@"; do
    expect "$tool" "position of its own choice" "Type: *DYN" -h
    expect "$tool" "mark of a position-independent program" "Flags:.* PIE" -d
done
if [ "$fortified" = true ] && readelf -Wd "$library" | grep -q 'NEEDED.*libc\.so\.6'; then
    for file in "$library" "$@"; do expect "$file" "checked libc call" "__[a-z]+_chk@" -s; done
fi
[ "$failures" = 0 ] && echo "elf: ok"
exit "$failures"
