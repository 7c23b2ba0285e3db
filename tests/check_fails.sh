#!/bin/sh
# A Criterion test that fails says why on the screen: runs those that fail on purpose, as run.sh runs all others.
# usage: check_fails.sh BUILD
set -eu
if said=$(meson test -C "$1" --no-rebuild --print-errorlogs --logbase fails --suite fails 2>&1); then
    printf '%s\n' "$said" "FAIL: what fails on purpose has passed"
    exit 1
fi
for words in 'fails::by_value' 'error 0.25, limit 0.125' 'fails::on_ranks' 'as rank 0 of 2 should' 'as rank 1 of 2 should'; do
    printf '%s\n' "$said" | grep -qF "$words" || { printf '%s\n' "$said" "FAIL: '$words' is not said"; exit 1; }
done
echo "fails are told: ok"
