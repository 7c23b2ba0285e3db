#!/usr/bin/env python3
"""compare_torch.py - a libusp layer on one rank beside PyTorch's attention, in one process, on the same tensors.

    python3 bench/compare_torch.py --library build/libusp.so [--works d128] [--csv FILE]

Each work is checked against float64, in one batch entry and the heads of one key head, and to be finite in all others
(a wrong one is named, not timed, and the exit status is 1), then timed in turn with its peers:
scaled_dot_product_attention by cuDNN on a GPU, with --flash2 also by FlashAttention-2, FlashAttention-3 where
`flash_attn_interface` can be imported, and the library itself: without the option that the work is about, in bf16,
without the window, or at the mean length of its documents, each counted as often as it has pairs. The example of
embedding the library from Python is torch_layer.py.

The CSV has a row for each work, pass and peer: work, pass, usp_ms, usp_tflops, peer, peer_ms, peer_tflops, ratio (of
TFLOP/s, usp over peer; the median over rounds), errors (relative RMS against float64, the largest of a pass' results;
of the peer against its own work), and the spreads of both times (half the range of their middle half, over the median).
TFLOP/s are of allowed pairs: 2 products forward, 5 backward."""
import argparse
import contextlib
import csv
import os
import re
import statistics
import sys
import time

import torch

from torch_kernels import print_kernels
from torch_layer import one_rank
from torch_peers import Ours, peers_of, serving
from torch_truth import errors, truth
from torch_works import all_works, draw, smaller

# ---- times -----------------------------------------------------------------------------------------------------------


def clock(device):
    if device.type == "cuda":
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
    return time.perf_counter()


def elapsed(begin, end):
    return begin.elapsed_time(end) if hasattr(begin, "elapsed_time") else 1e3 * (end - begin)


def take_turns(sides, call, device, rounds):
    """Milliseconds of each side's call in each round, the sides in turn."""
    marks = [[] for _ in sides]
    for _ in range(rounds):
        for side, list_ in zip(sides, marks):
            begin = clock(device)
            getattr(side, call)()
            list_.append((begin, clock(device)))
    if device.type == "cuda":
        torch.cuda.synchronize()
    return [[elapsed(*pair) for pair in list_] for list_ in marks]


LEAST_MS = 250  # of calls of a pass, so that short ones see more than one state of the clock


def times(sides, call, device, rounds):
    """The same when the GPU is warm."""
    round_ms = sum(list_[-1] for list_ in take_turns(sides, call, device, max(2, rounds // 4)))
    return take_turns(sides, call, device, max(rounds, int(LEAST_MS / round_ms)))


def summary(list_):
    low, middle, high = statistics.quantiles(list_, n=4)
    return middle, (high - low) / 2 / middle


def speedup(mine, theirs):
    """The median over rounds: two calls of a round have the same clock, those of different rounds may not."""
    return statistics.median(their / my for my, their in zip(mine, theirs))


# ---- program ---------------------------------------------------------------------------------------------------------


COLUMNS = ["work", "pass", "usp_ms", "usp_tflops", "peer", "peer_ms", "peer_tflops", "ratio", "usp_error", "peer_error",
           "usp_spread", "peer_spread"]


def errors_of(sides):
    """Of each side against the truth of its own work."""
    exact = {side.work.name: None for side in sides}
    for side in sides:
        if exact[side.work.name] is None:
            exact[side.work.name] = truth(side.work, side.inputs)
    return [errors(side, exact[side.work.name]) for side in sides]


ROUNDOFF = {torch.float32: 2 ** -20, torch.float16: 2 ** -11, torch.bfloat16: 2 ** -8}


def check(sides, wrong):
    """Refuses what is wrong: not finite, or beyond twice the largest error of the peers of its dtype, twice the dtype's
    roundoff without any, and eight times that in any case."""
    dtype = sides[0].work.dtype
    if not all(x.isfinite().all() for x in [sides[0].out, *sides[0].gradients]):
        raise RuntimeError("not all results are finite: not timed")
    for call, error in wrong[0].items():
        peers = [other[call] for side, other in zip(sides[1:], wrong[1:]) if side.work.dtype == dtype]
        budget = 2 * min(max(peers, default=ROUNDOFF[dtype]), 4 * ROUNDOFF[dtype])
        if not error <= budget:
            raise RuntimeError(f"{call} is wrong by {error:.3g}, where {budget:.3g} is allowed: not timed")


def row_of(call, sides, measured, wrong, i):
    """A row of the CSV: sides[0] and, but for i = 0, its peer i; `measured` as times gives it."""
    flops = [side.work.flops(call) for side in sides]
    ms, spread = zip(*map(summary, measured))
    row = {"work": sides[0].work.name, "pass": call, "usp_ms": ms[0], "usp_tflops": flops[0] / ms[0] / 1e9,
           "usp_error": wrong[0][call], "usp_spread": spread[0]}
    if i:
        row |= {"peer": sides[i].name, "peer_ms": ms[i], "peer_tflops": flops[i] / ms[i] / 1e9,
                "ratio": speedup(measured[0], measured[i]) * flops[0] / flops[i], "peer_error": wrong[i][call],
                "peer_spread": spread[i]}
    return row


def compare(library, mesh, work, device, options):
    """The rows of a work."""
    inputs = draw(work, device)
    ours = Ours(library, mesh, work, inputs)
    ours.forward()
    ours.backward()
    complain = lambda side, reason: print(f"{work.name}: {side.name}: {reason}", file=sys.stderr)
    sides = [ours] + serving(peers_of(library, mesh, work, inputs, options.flash2), complain)
    wrong = errors_of(sides)
    check(sides, wrong)
    rows = []
    for call in ("forward", "backward"):
        measured = times(sides, call, device, options.rounds)
        rows += [row_of(call, sides, measured, wrong, i) for i in (range(1, len(sides)) if sides[1:] else (0,))]
        if options.kernels:
            print_kernels(f"{work.name} {call}", getattr(ours, call))
    for side in sides:
        side.close()
    return rows


def text(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@contextlib.contextmanager
def table(path):
    """Writes rows on the screen and, as they come, into a file, if one is named."""
    print("  ".join(f"{column:>12}" for column in COLUMNS))
    with open(path or os.devnull, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()

        def add(row):
            print("  ".join(f"{text(row.get(column, '')):>12}" for column in COLUMNS), flush=True)
            writer.writerow({key: text(value) for key, value in row.items()})
            file.flush()
        yield add


def read_options():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--library", default="libusp.so.0", help="the library to load")
    parser.add_argument("--works", default="", help="only works in whose names this regular expression is found")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=0, help="this many tokens instead, to try the program")
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--flash2", action="store_true", help="PyTorch's FlashAttention-2 is a peer too")
    parser.add_argument("--kernels", action="store_true", help="print the time of each kernel of the layer, on a GPU")
    parser.add_argument("--csv", default="")
    options = parser.parse_args()
    if options.kernels and not options.device.startswith("cuda"):
        parser.error("--kernels needs a GPU")
    if options.tokens and options.tokens < 16:
        parser.error("--tokens must be 16 or more")
    if options.rounds < 2:
        parser.error("--rounds must be 2 or more")
    try:
        options.works = [work for work in all_works() if re.search(options.works, work.name)]
    except re.error as wrong:
        parser.error(f"--works is no regular expression: {wrong}")
    if not options.works:
        parser.error("--works names no work")
    return options


def main():
    options, failed = read_options(), 0
    device = torch.device(options.device)
    with one_rank(options.library, device) as (library, mesh), table(options.csv) as add:
        for work in options.works:
            try:
                tried = smaller(work, options.tokens) if options.tokens else work
                for row in compare(library, mesh, tried, device, options):
                    add(row)
            except RuntimeError as failure:
                print(f"{work.name}: {failure}", file=sys.stderr)
                failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main())
