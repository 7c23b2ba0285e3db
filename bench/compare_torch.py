#!/usr/bin/env python3
"""compare_torch.py - a libusp layer on one rank beside PyTorch's attention, in one process, on the same tensors.

    python3 bench/compare_torch.py --library build/libusp.so [--works d128] [--csv FILE]

Each work is checked against float64, then timed in turn with its peer: scaled_dot_product_attention by cuDNN on a GPU,
FlashAttention-3 beside it where `flash_attn_interface` can be imported. It is also the example of embedding the library
from Python: ctypes, tensors by data_ptr() and strides, the stream of PyTorch.

Columns of the CSV: work, pass, usp_ms, usp_tflops, peer, peer_ms, peer_tflops, ratio (usp over peer), errors (relative
RMS against float64, the largest of a pass' results), and the spreads of both times (half the range of their middle
half, over the median). TFLOP/s are of allowed pairs: 2 products forward, 5 backward."""
import argparse
import csv
import ctypes
import math
import statistics
import sys
from ctypes import POINTER, Structure, byref, c_char_p, c_float, c_int, c_int64, c_size_t, c_uint64, c_void_p

import torch
import torch.nn.functional as functional
from torch.nn.attention import SDPBackend, sdpa_kernel

# ---- usp.h -----------------------------------------------------------------------------------------------------------


class Tensor(Structure):
    _fields_ = [("data", c_void_p), ("batch", c_int64), ("token", c_int64), ("head", c_int64)]


class Sized(Structure):
    """A struct that begins with its size; what is not given is 0."""

    def __init__(self, **fields):
        super().__init__(struct_size=ctypes.sizeof(self), **fields)


class SequenceConfig(Sized):
    _fields_ = [("struct_size", c_size_t), ("layout", c_int), ("max_documents", c_int), ("tokens", c_int64),
                ("key_tokens", c_int64), ("documents", c_int64), ("document_ends", POINTER(c_int64))]


class LayerConfig(Sized):
    _fields_ = [("struct_size", c_size_t), ("attention", c_int), ("mask", c_int), ("dtype", c_int), ("batch", c_int),
                ("heads", c_int), ("kv_heads", c_int), ("value_heads", c_int), ("head_dim", c_int),
                ("value_dim", c_int), ("scale", c_float), ("return_lse", c_int), ("deterministic", c_int),
                ("state_exchange", c_int), ("recompute_state", c_int), ("initial_state", c_int),
                ("final_state", c_int), ("decay", c_void_p), ("window_left", c_int64), ("window_right", c_int64),
                ("alignment", c_int), ("route", c_int), ("soft_cap", c_float), ("dropout", c_float), ("sinks", c_int),
                ("dlse", c_int), ("max_logit", c_int), ("reserved", c_int), ("slopes", POINTER(c_float))]


class Forward(Sized):
    _fields_ = [("struct_size", c_size_t), ("q", Tensor), ("k", Tensor), ("v", Tensor), ("out", Tensor),
                ("lse", c_void_p), ("initial_state", c_void_p), ("final_state", c_void_p), ("saved", c_void_p),
                ("sinks", c_void_p), ("max_logit", c_void_p), ("dropout_state", c_void_p)]


class Backward(Sized):
    _fields_ = ([("struct_size", c_size_t)] +
                [(name, Tensor) for name in ("q", "k", "v", "out", "dout", "dq", "dk", "dv")] +
                [(name, c_void_p) for name in ("dfinal_state", "dinitial_state", "saved", "initial_state", "sinks",
                                               "dsinks", "dlse", "dropout_state")])


class Sizes(Sized):
    _fields_ = [(name, c_size_t) for name in ("struct_size", "forward", "backward", "exchange", "saved", "alignment",
                                              "forward_saving")]


CAUSAL, FULL = 1, 2
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class Library:
    """The library's calls; one that fails raises its sentence."""

    def __init__(self, path):
        self.calls = ctypes.CDLL(path)
        self.calls.usp_last_error.restype = c_char_p

    def __getattr__(self, name):
        def call(*arguments):
            if getattr(self.calls, "usp_" + name)(*arguments) != 0:
                raise RuntimeError(self.calls.usp_last_error().decode())
        return call

    def make(self, name, *arguments):
        made = c_void_p()
        getattr(self, name)(*arguments, byref(made))
        return made


def view(x):
    """[batch, heads, tokens, dim] of any strides."""
    return Tensor(x.data_ptr(), x.stride(0), x.stride(2), x.stride(1))


# ---- works -----------------------------------------------------------------------------------------------------------


class Work:
    def __init__(self, name, tokens, heads, kv_heads=None, dim=128, value_dim=None, causal=True, window=0, ends=None,
                 dtype=torch.bfloat16, **options):
        self.name, self.tokens, self.heads, self.kv_heads = name, tokens, heads, kv_heads or heads
        self.dim, self.value_dim, self.causal, self.window, self.ends = dim, value_dim or dim, causal, window, ends
        self.dtype, self.options = dtype, options
        self.batch = 1 if ends else max(1, 16384 // tokens)

    def lengths(self):
        begins = [0] + self.ends[:-1] if self.ends else [0]
        return [end - begin for begin, end in zip(begins, self.ends or [self.tokens])]

    def pairs(self):
        """Allowed pairs of one head of one batch entry."""
        def of(length):
            if not self.causal:
                return length * length
            reach = min(self.window + 1, length) if self.window else length
            return reach * (reach + 1) // 2 + (length - reach) * reach
        return sum(of(length) for length in self.lengths())

    def flops(self, backward):
        each = 3 * self.dim + 2 * self.value_dim if backward else self.dim + self.value_dim
        return 2.0 * each * self.pairs() * self.heads * self.batch

    def plain(self):
        return not (self.window or self.ends or self.options)


def packed_ends(tokens, shortest, longest):
    generator, ends = torch.Generator().manual_seed(7), []
    while not ends or ends[-1] < tokens:
        length = shortest * (longest / shortest) ** torch.rand((), generator=generator).item()
        ends.append(min(tokens, (ends[-1] if ends else 0) + int(length)))
    return ends


def all_works():
    k = 1024
    works = [Work(f"d128 {kind} {heads}:{kv} {s}K", s * k, heads, kv, causal=kind == "causal")
             for kind, heads, kv in (("causal", 16, 16), ("full", 16, 16), ("causal", 32, 8), ("causal", 64, 8))
             for s in (4, 16, 64)]
    works += [Work(f"d128 causal 16:16 {s}K", s * k, 16) for s in (1, 2)]
    works += [Work(f"d64 causal 32:32 {s}K", s * k, 32, dim=64) for s in (4, 16)]
    works += [Work("d192/128 causal 16:16 8K", 8 * k, 16, dim=192, value_dim=128),
              Work("d256 causal 16:16 16K", 16 * k, 16, dim=256),
              Work("d64 window 1024 64:8 32K", 32 * k, 64, 8, dim=64, window=1023),
              Work("d128 window 4K 16:16 64K", 64 * k, 16, window=4095),
              Work("d128 documents 256..16K 32:8 64K", 64 * k, 32, 8, ends=packed_ends(64 * k, 256, 16 * k)),
              Work("d128 f16 causal 16:16 16K", 16 * k, 16, dtype=torch.float16)]
    works += [Work(f"d128 {name} causal 16:16 16K", 16 * k, 16, **{name: value})
              for name, value in (("sinks", 1), ("soft_cap", 50.0), ("dropout", 0.1), ("slopes", 1))]
    return works + [Work(f"d128 deterministic causal 16:16 {s}K", s * k, 16, deterministic=1) for s in (4, 16)]


# ---- one side: ours --------------------------------------------------------------------------------------------------


class Ours:
    def __init__(self, library, mesh, work, tensors, stream):
        self.library, self.work, self.stream = library, work, stream
        self.q, self.k, self.v, self.dout = tensors
        device = self.q.device
        ends = (c_int64 * len(work.ends))(*work.ends) if work.ends else None
        sequence = SequenceConfig(tokens=work.tokens, documents=len(work.ends) if ends else 0, document_ends=ends)
        slopes = [2 ** (-8 * (h + 1) / work.heads) for h in range(work.heads)]
        options = dict(work.options)
        if options.pop("slopes", 0):
            options["slopes"] = (c_float * work.heads)(*slopes)
        config = LayerConfig(attention=1, mask=CAUSAL if work.causal else FULL, dtype=DTYPES[work.dtype],
                             batch=work.batch, heads=work.heads, kv_heads=work.kv_heads, head_dim=work.dim,
                             value_dim=work.value_dim, window_left=work.window, **options)
        self.sequence = library.make("sequence_create", mesh, byref(sequence))
        self.layer = library.make("layer_create", mesh, self.sequence, byref(config))
        sizes = Sizes()
        library.layer_get_sizes(self.layer, byref(sizes))
        memory = [torch.empty(n + 256, dtype=torch.uint8, device=device)
                  for n in (max(sizes.forward, sizes.backward), sizes.saved)]
        self.workspace, self.saved = [(-x.data_ptr() % 256) + x.data_ptr() for x in memory]
        self.bytes, self.memory = max(sizes.forward, sizes.backward), memory
        self.out = torch.full_like(self.dout, float("nan"))
        self.gradients = [torch.full_like(x, float("nan")) for x in (self.q, self.k, self.v)]
        self.sinks = torch.randn(work.heads, device=device) if "sinks" in options else None
        self.dsinks = torch.empty_like(self.sinks) if self.sinks is not None else None
        self.words = torch.tensor([17, 4], dtype=torch.int64, device=device) if "dropout" in options else None
        self.describe_calls()

    def describe_calls(self):
        address = lambda x: x.data_ptr() if x is not None else None
        given = dict(q=view(self.q), k=view(self.k), v=view(self.v), out=view(self.out), sinks=address(self.sinks),
                     dropout_state=address(self.words), saved=self.saved)
        self.forward_args = Forward(**given)
        dq, dk, dv = self.gradients
        self.backward_args = Backward(dout=view(self.dout), dq=view(dq), dk=view(dk), dv=view(dv),
                                      dsinks=address(self.dsinks), **given)

    def forward(self):
        self.library.layer_forward(self.layer, byref(self.forward_args), c_void_p(self.workspace),
                                   c_size_t(self.bytes), self.stream)

    def backward(self):
        self.library.layer_backward(self.layer, byref(self.backward_args), c_void_p(self.workspace),
                                    c_size_t(self.bytes), self.stream)

    def close(self):
        self.library.calls.usp_layer_destroy(self.layer)
        self.library.calls.usp_sequence_destroy(self.sequence)


# ---- the other side --------------------------------------------------------------------------------------------------


class Torch:
    """scaled_dot_product_attention by one backend; plain masks only."""

    def __init__(self, work, tensors, backend, name):
        self.work, self.backend, self.name = work, backend, name
        self.leaves = [x.detach().clone().requires_grad_() for x in tensors[:3]]
        self.dout = tensors[3]

    def forward(self):
        q, k, v = self.leaves
        with sdpa_kernel(self.backend):
            self.out = functional.scaled_dot_product_attention(q, k, v, is_causal=self.work.causal,
                                                               enable_gqa=self.work.heads != self.work.kv_heads)

    def backward(self):
        self.gradients = torch.autograd.grad(self.out, self.leaves, self.dout, retain_graph=True)


class Flash3:
    name = "FlashAttention-3"

    def __init__(self, work, tensors, attend):
        self.work, self.attend = work, attend
        self.leaves = [x.detach().transpose(1, 2).clone().requires_grad_() for x in tensors[:3]]
        self.dout = tensors[3].transpose(1, 2).contiguous()

    def forward(self):
        window = (self.work.window or -1, -1)
        out = self.attend(*self.leaves, causal=self.work.causal, window_size=window,
                          softcap=self.work.options.get("soft_cap", 0.0))
        self.result = out[0] if isinstance(out, tuple) else out
        self.out = self.result.transpose(1, 2)

    def backward(self):
        gradients = torch.autograd.grad(self.result, self.leaves, self.dout, retain_graph=True)
        self.gradients = [x.transpose(1, 2) for x in gradients]


def peers_of(work, tensors):
    peers = []
    if work.plain():
        gpu = tensors[0].is_cuda
        backend = SDPBackend.CUDNN_ATTENTION if gpu else SDPBackend.MATH
        peers.append(Torch(work, tensors, backend, "torch SDPA, cuDNN" if gpu else "torch SDPA, math"))
    try:
        from flash_attn_interface import flash_attn_func
        if not work.ends and set(work.options) <= {"soft_cap"} and tensors[0].is_cuda:
            peers.append(Flash3(work, tensors, flash_attn_func))
    except ImportError:
        pass
    return peers


# ---- errors against float64 ------------------------------------------------------------------------------------------


def truth(work, tensors, rows=1024):
    """out, dq, dk, dv in float64 of batch entry 0 and the query heads of key head 0, some rows at a time."""
    group = work.heads // work.kv_heads
    q, dout = (x[0, :group].double() for x in (tensors[0], tensors[3]))
    k, v = (x[0, 0].double() for x in (tensors[1], tensors[2]))
    out, dq, dk, dv = torch.zeros_like(dout), torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    at = torch.arange(work.tokens, device=q.device)
    document = torch.bucketize(at, torch.tensor(work.ends or [work.tokens], device=q.device), right=True)
    for h in range(group):
        for first in range(0, work.tokens, rows):
            mine = slice(first, min(first + rows, work.tokens))
            row = at[mine, None]
            allowed = document[mine, None] == document
            if work.causal:
                allowed &= at <= row
            if work.window:
                allowed &= at >= row - work.window
            scores = (q[h, mine] @ k.T / math.sqrt(work.dim)).masked_fill(~allowed, -math.inf)
            p = torch.softmax(scores, 1)
            out[h, mine] = p @ v
            dp = dout[h, mine] @ v.T
            ds = p * (dp - (p * dp).sum(1, keepdim=True)) / math.sqrt(work.dim)
            dq[h, mine] = ds @ k
            dk += ds.T @ q[h, mine]
            dv += p.T @ dout[h, mine]
    return out, dq, dk, dv


def relative(x, exact):
    return ((x.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()).item()


def errors(side, exact, work):
    group = work.heads // work.kv_heads
    out, dq, dk, dv = exact
    gradients = [side.gradients[0][0, :group], side.gradients[1][0, 0], side.gradients[2][0, 0]]
    return relative(side.out[0, :group], out), max(relative(x, y) for x, y in zip(gradients, (dq, dk, dv)))


# ---- times -----------------------------------------------------------------------------------------------------------


def clock(device):
    if device.type == "cuda":
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
    import time
    return time.perf_counter()


def elapsed(begin, end):
    return begin.elapsed_time(end) if hasattr(begin, "elapsed_time") else 1e3 * (end - begin)


def times(sides, call, device, rounds):
    """Milliseconds of each side's call, the sides in turn."""
    marks = [[] for _ in sides]
    for _ in range(rounds):
        for side, list_ in zip(sides, marks):
            begin = clock(device)
            getattr(side, call)()
            list_.append((begin, clock(device)))
    if device.type == "cuda":
        torch.cuda.synchronize()
    return [[elapsed(*pair) for pair in list_[len(list_) // 4:]] for list_ in marks]


def summary(list_):
    low, middle, high = statistics.quantiles(list_, n=4)
    return middle, (high - low) / 2 / middle


# ---- program ---------------------------------------------------------------------------------------------------------


def draw(work, device):
    torch.manual_seed(1)
    shapes = ((work.heads, work.dim), (work.kv_heads, work.dim), (work.kv_heads, work.value_dim),
              (work.heads, work.value_dim))
    return [torch.randn(work.batch, work.tokens, h, d, device=device, dtype=torch.float32).to(work.dtype).transpose(1, 2)
            for h, d in shapes]


def compare(library, mesh, work, device, rounds):
    tensors = draw(work, device)
    stream = c_void_p(torch.cuda.current_stream().cuda_stream if device.type == "cuda" else None)
    ours = Ours(library, mesh, work, tensors, stream)
    sides = [ours] + peers_of(work, tensors)
    for side in sides:
        side.forward()
        side.backward()
    exact = truth(work, tensors) if not work.options or "deterministic" in work.options else None
    wrong = [errors(side, exact, work) if exact else (math.nan, math.nan) for side in sides]
    rows = []
    for number, call in enumerate(("forward", "backward")):
        measured = [summary(list_) for list_ in times(sides, call, device, rounds)]
        flops = work.flops(number == 1)
        for i in range(1, len(sides)) if len(sides) > 1 else (None,):
            ms, spread = measured[0]
            row = {"work": work.name, "pass": call, "usp_ms": ms, "usp_tflops": flops / ms / 1e9,
                   "usp_error": wrong[0][number], "usp_spread": spread}
            if i is not None:
                peer_ms, peer_spread = measured[i]
                row |= {"peer": sides[i].name, "peer_ms": peer_ms, "peer_tflops": flops / peer_ms / 1e9,
                        "ratio": peer_ms / ms, "peer_error": wrong[i][number], "peer_spread": peer_spread}
            rows.append(row)
    ours.close()
    return rows


COLUMNS = ["work", "pass", "usp_ms", "usp_tflops", "peer", "peer_ms", "peer_tflops", "ratio", "usp_error", "peer_error",
           "usp_spread", "peer_spread"]


def text(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--library", default="libusp.so.0", help="the library to load")
    parser.add_argument("--works", default="", help="only works whose name holds this")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=0, help="this many tokens instead, to try the program")
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--csv", default="")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda":
        torch.cuda.init()
        torch.empty(1, device=device)
    library = Library(options.library)
    world = library.make("world_create_env", None)
    mesh = library.make("mesh_create", world, 1, 1)
    rows = []
    for work in all_works():
        if options.works not in work.name:
            continue
        if options.tokens:
            work.tokens, work.batch = options.tokens, 1
            work.ends = packed_ends(options.tokens, 8, 64) if work.ends else None
        try:
            rows += compare(library, mesh, work, device, options.rounds)
        except (RuntimeError, torch.cuda.OutOfMemoryError) as failure:
            print(f"{work.name}: {failure}", file=sys.stderr)
            continue
        for row in rows[-2:]:
            print("  ".join(f"{text(row.get(column, '')):>12}" for column in COLUMNS), flush=True)
    if options.csv:
        with open(options.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows({key: text(value) for key, value in row.items()} for row in rows)
    library.calls.usp_mesh_destroy(mesh)
    library.calls.usp_world_destroy(world)


if __name__ == "__main__":
    main()
