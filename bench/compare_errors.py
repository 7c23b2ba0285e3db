#!/usr/bin/env python3
"""compare_errors.py - errors against float64 of a libusp layer, PyTorch's cuDNN and its FlashAttention-2.

    python3 bench/compare_errors.py --library build/libusp.so [--csv FILE]

All three get the same bf16 inputs, causal, as many key heads as query heads; dout is normal. Errors are of one head of
each of several draws (--draws): RMS of the difference over the RMS of the true result, each over all draws. The first
rows of a head, with few keys, have most of dq, so in one draw two roundings of one size differ by 4 %. Where a gradient
is 0 in truth (below 10^-6 of the largest gradient's RMS) errors are over the RMS of the largest one of dq, dk and dv;
the column "relative to" says which.
The CSV has a row for each kind of inputs and result, a column for each side; "-" where a side refuses.

    normal          q, k, v ~ N(0, 1); once more at d 64 and at 192/128, all else at d 128
    std 8           q, k, v ~ N(0, 64): nearly all weight of a row on one key, anywhere
    equal keys      all rows of k are one row: out is a mean; dq is 0
    equal values    all rows of v are one row: out is that; dq and dk are 0
    dominant key    the scores of key 0 are about 14 above the others, which hold 1 % of the weight at 4K
    64K keys        as normal, 65536 tokens
    lse 1e4         the first 16 numbers of every row of q and k are 84: all scores lie about 9979 higher"""
import argparse
import collections
import csv
import math
import sys

import torch

from torch_layer import one_rank
from torch_peers import Ours, cudnn, flash2
from torch_truth import parts, rms, truth
from torch_works import Work, draw

# ---- inputs ----------------------------------------------------------------------------------------------------------


def normal(_):
    pass


def wide(inputs):
    for x in (inputs.q, inputs.k, inputs.v):
        x *= 8


def equal_keys(inputs):
    inputs.k[:] = inputs.k[:, :, :1].clone()


def equal_values(inputs):
    inputs.v[:] = inputs.v[:, :, :1].clone()


def dominant(inputs):
    inputs.q += 1
    inputs.k[:, :, 0] = 14 / inputs.k.shape[3] ** 0.5


def offset(inputs):
    inputs.q[..., :16] = 84
    inputs.k[..., :16] = 84


def all_kinds():
    """(work, what makes its inputs of normal ones); the work's name is that of the inputs."""
    def work(name, tokens=4096, heads=4, dim=128, value_dim=0):
        return Work(name, tokens, heads, dim=dim, value_dim=value_dim, batch=1)
    return [(work("normal"), normal), (work("normal d 64", dim=64), normal),
            (work("normal 192/128", dim=192, value_dim=128), normal),
            (work("std 8"), wide), (work("equal keys"), equal_keys), (work("equal values"), equal_values),
            (work("dominant key"), dominant), (work("64K keys", 65536, 2), normal), (work("lse 1e4"), offset)]


# ---- errors ----------------------------------------------------------------------------------------------------------


SIDES = ["libusp", "cuDNN", "FlashAttention-2"]
RESULTS = ["out", "lse", "dq", "dk", "dv"]
COLUMNS = ["inputs", "result", "relative to"] + SIDES


def scales(own):
    """Of each result, whose RMS is given, what its error is relative to: (RMS, its name)."""
    largest = max(("dq", "dk", "dv"), key=own.get)
    return {name: (own[largest], largest) if own[name] < 1e-6 * own[largest] else (own[name], name) for name in RESULTS}


def differences(name, make, exact):
    """RMS of the difference of each result; nothing of a side that refuses the work, which is told with its name."""
    side = None
    try:
        side = make()
        side.forward()
        side.backward()
        found = {name: rms(x - getattr(exact, name)) for name, x in parts(side).items()}
        lse = side.lse
    except RuntimeError as reason:
        print(f"{name}: {reason}", file=sys.stderr)
        return {}
    finally:
        if side:
            side.close()
    return found if lse is None else found | {"lse": rms(lse[0, :1] - exact.lse)}


def add_draw(squares, library, mesh, work, inputs):
    """Adds the mean squares of the true results, and of each side's differences, the sides one after the other."""
    exact = truth(work, inputs)
    makers = [lambda: Ours(library, mesh, work, inputs, return_lse=1), lambda: cudnn(work, inputs),
              lambda: flash2(work, inputs)]
    for name in RESULTS:
        squares["truth", name] += rms(getattr(exact, name)) ** 2
    for side, make in zip(SIDES, makers):
        for name, difference in differences(f"{work.name}: {side}", make, exact).items():
            squares[side, name] += difference ** 2


def rows_of(library, mesh, work, change, device, draws):
    """The rows of one kind of inputs."""
    squares = collections.defaultdict(float)
    for seed in range(1, draws + 1):
        inputs = draw(work, device, seed)
        change(inputs)
        add_draw(squares, library, mesh, work, inputs)
    rows = []
    for result, (scale, name) in scales({name: math.sqrt(squares["truth", name]) for name in RESULTS}).items():
        cells = {side: f"{math.sqrt(squares[side, result]) / scale:.3g}" if (side, result) in squares else "-"
                 for side in SIDES}
        rows.append({"inputs": work.name, "result": result, "relative to": name} | cells)
    return rows


# ---- program ---------------------------------------------------------------------------------------------------------


def read_options():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--library", default="libusp.so.0", help="the library to load")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--draws", type=int, default=16, help="inputs of each kind; an eighth of 64K tokens")
    parser.add_argument("--tokens", type=int, default=0, help="at most so many tokens, to try the program")
    parser.add_argument("--csv", default="")
    options = parser.parse_args()
    if options.draws < 1:
        parser.error("--draws must be 1 or more")
    if options.tokens and options.tokens < 16:
        parser.error("--tokens must be 16 or more")
    return options


def main():
    options, rows = read_options(), []
    device = torch.device(options.device)
    print("  ".join(f"{column:>16}" for column in COLUMNS))
    with one_rank(options.library, device) as (library, mesh):
        for work, change in all_kinds():
            work.tokens = min(work.tokens, options.tokens or work.tokens)
            draws = max(1, options.draws // 8) if work.tokens > 4096 else options.draws
            found = rows_of(library, mesh, work, change, device, draws)
            for row in found:
                print("  ".join(f"{row[column]:>16}" for column in COLUMNS), flush=True)
            rows += found
    if options.csv:
        with open(options.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    return int(any(row["libusp"] in ("-", "nan") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
