#!/bin/sh
# Installs a build and uses it as a stranger would: pkg-config, static linking, CMake, man pages, and nothing exported but usp_.
# usage: check_install.sh BUILD SOURCE
set -eu
build=$1 source=$2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
prefix=$work/prefix
fail() { echo "FAIL: $*" >&2; exit 1; }

meson install -C "$build" --no-rebuild --destdir "$work/stage" >"$work/install.log" 2>&1 || { cat "$work/install.log"; fail "meson install"; }
installed=$(find "$work/stage" -name usp.pc | head -n 1)
[ -n "$installed" ] || fail "usp.pc is not installed"
libdir=$(dirname "$(dirname "$installed")")
root=$(dirname "$(find "$work/stage" -type d -name include | head -n 1)")
for file in "$root/include/usp.h" "$libdir/libusp.so" "$libdir/libusp.so.0" "$libdir/libusp.a" \
            "$libdir/cmake/usp/usp-config.cmake" "$libdir/cmake/usp/usp-config-version.cmake" "$root/share/licenses/usp/LICENSE"; do
    [ -e "$file" ] || fail "$file is not installed"
done
objdump -p "$libdir/libusp.so" | grep -q 'SONAME *libusp.so.0$' || fail "the SONAME is not libusp.so.0"
strangers=$(nm -D --defined-only "$libdir/libusp.so" | awk '$3 !~ /^usp_/ { print $3 }')
[ -z "$strangers" ] || fail "exported without usp_: $strangers"
declared=$(sed -n 's/^USP_API.*[ *]\(usp_[a-z_]*\)(.*/\1/p' "$source/include/usp.h" | sort)
exported=$(nm -D --defined-only "$libdir/libusp.so" | awk '{ print $3 }' | sort)
[ "$declared" = "$exported" ] || fail "usp.h declares and libusp.so exports different functions:
$(printf '%s\n' "$declared" >"$work/a"; printf '%s\n' "$exported" >"$work/b"; diff "$work/a" "$work/b")"
for tool in "$root"/bin/usp_*; do
    env -u LD_LIBRARY_PATH "$tool" --version >/dev/null || fail "$tool does not find its library"
done
# Every tool has its page, where help2man was there to make them.
if grep -q 'usp_[a-z]*\.1' "$build/build.ninja"; then
    for tool in "$root"/bin/usp_*; do
        page=$root/share/man/man1/$(basename "$tool").1
        for part in NAME SYNOPSIS DESCRIPTION; do
            grep -qs "^\.SH $part" "$page" || fail "$page is not a manual page: it has no $part"
        done
        grep -qs -- '\\-\\-help' "$page" || fail "$page does not tell the options"
    done
fi
if objdump -p "$libdir/libusp.so" | grep -Eq 'NEEDED *lib(cuda\.so|cublas)'; then fail "libusp.so needs the driver or cuBLAS"; fi

cat >"$work/user.c" <<'END'
#include <stdio.h>
#include <usp.h>
int main(void) {
    usp_rendezvous *rendezvous;
    if (usp_rendezvous_create(1, &rendezvous) != USP_OK) return 1;
    usp_rendezvous_destroy(rendezvous);
    printf("%d\n", usp_version());
    return usp_version() / 10000 != USP_VERSION_MAJOR;
}
END
cp "$work/user.c" "$work/user.cc"
# The prefix in usp.pc is where a package would put it; here it is staged.
export PKG_CONFIG_PATH="$libdir/pkgconfig" PKG_CONFIG_SYSROOT_DIR="$work/stage"
flags=$(pkg-config --cflags --libs usp)
cc -std=c99 -pedantic -Wall -Werror "$work/user.c" $flags -o "$work/user"
LD_LIBRARY_PATH="$libdir${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" "$work/user" >/dev/null || fail "the shared library's user"
others=$(PKG_CONFIG_SYSROOT_DIR='' pkg-config --libs --static usp | sed 's/-lusp//')
cc -std=c99 "$work/user.c" $(pkg-config --cflags usp) "$libdir/libusp.a" $others -o "$work/user_static" &&
    "$work/user_static" >/dev/null || fail "the static library's user"
if objdump -p "$work/user_static" | grep -q 'NEEDED *libusp'; then fail "the static library's user needs the shared one"; fi
c++ -std=c++17 -pedantic -Wall -Werror "$work/user.cc" $flags -o "$work/user_cc" 2>/dev/null &&
    LD_LIBRARY_PATH="$libdir${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" "$work/user_cc" >/dev/null || fail "the C++ user"

if command -v cmake >/dev/null 2>&1; then
    cat >"$work/CMakeLists.txt" <<'END'
cmake_minimum_required(VERSION 3.16)
project(user C)
find_package(usp 0.1 REQUIRED CONFIG)
add_executable(user user.c)
target_link_libraries(user usp::usp)
END
    cmake -G Ninja -S "$work" -B "$work/cmake" -Dusp_DIR="$libdir/cmake/usp" >"$work/cmake.log" 2>&1 &&
        cmake --build "$work/cmake" >>"$work/cmake.log" 2>&1 || { cat "$work/cmake.log"; fail "the CMake user"; }
    LD_LIBRARY_PATH="$libdir${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" "$work/cmake/user" >/dev/null || fail "the CMake user does not run"
fi
echo "install: ok"
