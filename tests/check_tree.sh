#!/bin/sh
# Reads the source tree: the dependency rule, each header alone, and the few rules of style that a machine can hold.
# usage: check_tree.sh SOURCE
set -eu
cd "$1"
bad=0
complain() { echo "FAIL: $1"; printf '%s\n' "$2"; bad=1; }
none() { # what, lines that should not be there
    [ -z "$2" ] || complain "$1" "$2"
}

# includes FOLDER...: its #include lines, as FILE:LINE:#include "NAME", without folders in front of the name.
includes() { grep -rnE '^ *# *include' "$@" --include='*.[ch]' --include='*.cu' --include='*.cuh' | sed -E 's@[<"]([^<">]*/)?([^<">/]+)[>"]@"\2"@'; }
none "lib/ includes a CUDA, NCCL or MPI header" "$(includes lib include | grep -E '"(cuda|cublas|nccl|mpi)[A-Za-z0-9_]*\.h' || true)"
none "lib/ or comm/ includes cuda/, or cuda/ includes comm/" "$(
    for name in $(ls cuda | grep -E '\.(h|cuh)$'); do includes lib comm | grep "\"$name\"" || true; done
    for name in $(ls comm | grep '\.h$'); do includes cuda | grep "\"$name\"" || true; done)"

# A .cu file: kernels, what they call, and launchers. All it shows to others is named usp_; it owns no memory, stream or
# event and waits for nothing.
none "a .cu file shows a name that is not usp_" "$(
    grep -nE '^[A-Za-z_].*[(=]' cuda/*.cu | grep -vE '^[^:]*:[0-9]+:(static|constexpr|template|typedef|using|struct) ?' |
    grep -vE '[ *]usp_[a-z0-9_]+(\(| = )' || true)"
none "a .cu file does more than to launch kernels" "$(
    grep -nE 'cuda(Malloc|Free|Memcpy|Memset|Stream[A-Z]|Event|Host|DeviceSync|Set|Graph)|\b(malloc|calloc|free|new|delete|std::)\b' cuda/*.cu |
    grep -vE 'std::is_|^[^:]*:[0-9]+: *(//|/?\*)' || true)"
none "memory counts as constant, which a kernel that begins early must not have" "$(
    grep -nE '__ldg|__restrict__|ld\.global\.nc' cuda/*.cu cuda/*.cuh | grep -v 'cuda/launch.cuh' || true)"
none "a kernel does not call begin_kernel" "$(for file in $(grep -l __global__ cuda/*.cu cuda/*.cuh); do
    [ "$(grep -c __global__ "$file")" = "$(grep -c ' begin_kernel();' "$file")" ] || echo "$file"
done)"
none "a constructor of a backend is called outside lib/world.c or lib/devices.c" "$(
    grep -rnE 'usp_(transport_create|device_create)_[a-z_]+\(' lib comm cuda --include='*.c' |
    grep -vE '^lib/world\.c|^lib/devices\.c|^[^:]*:[0-9]+:(usp_status|void)|^lib/absent\.c' || true)"
none "the library prints, exits or aborts" "$(
    grep -nE '\b(printf|puts|exit|abort|assert)\(' lib/*.c lib/cpu/*.c comm/*.c cuda/*.c | grep -vE 'snprintf|->abort\(|\.abort|_abort\(|ops->' || true)"
none "dead code or notes to self" "$(grep -rnE '#if 0|\<(TODO|FIXME|XXX)\>([^.]|$)' include lib cuda comm tests bench docs meson.build |
    grep -v 'tests/check_tree.sh' || true)"
none "lines over 120 columns" "$(find include lib cuda comm -name '*.[ch]' -o -name '*.cu*' |
    xargs awk 'length > 120 { print FILENAME ":" FNR }')"
none "environment variables change the library" "$(grep -rnE 'setenv|putenv' lib comm cuda || true)"

for header in include/usp.h; do
    cc -std=c99 -Wall -Wextra -pedantic -Werror -fsyntax-only -x c "$header" || bad=1
    cc -std=c11 -Wall -Wextra -pedantic -Werror -fsyntax-only -x c "$header" || bad=1
    if command -v c++ >/dev/null 2>&1; then
        c++ -std=c++17 -Wall -Wextra -pedantic -Werror -fsyntax-only -x c++ "$header" || bad=1
    fi
done
for header in lib/*.h lib/cpu/*.h comm/*.h cuda/*.h bench/*.h tests/*.h; do
    flags=
    case $header in
    cuda/*) flags=-Icuda ;;
    bench/*) flags=-Ibench ;;
    tests/expect.h) echo '#include <criterion/criterion.h>' | cc -fsyntax-only -x c - 2>/dev/null || continue ;;
    esac
    printf '#include "%s"\n' "$header" |
        cc -std=c11 -D_GNU_SOURCE -Wall -Wextra -Werror -fsyntax-only -Iinclude -Ilib -Icomm $flags -Itests -I. -x c - || bad=1
done
[ "$bad" = 0 ] && echo "tree: ok"
exit "$bad"
