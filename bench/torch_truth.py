"""torch_truth.py - a work in float64 by its definition, and how far results are from it.

What is compared is of batch entry 0 and the `group` query heads of key head 0: out and dq [group, tokens, dim], lse
[group, tokens], dk and dv [tokens, dim]."""
import math
import types

import torch

# ---- dropout: lib/dropout.h in int64, whose products wrap as those of uint64 do --------------------------------------

LOW = 0xffffffff


def signed(x):
    """A 64-bit number as int64 holds it."""
    x &= (1 << 64) - 1
    return x - (1 << 64) if x >> 63 else x


def shifted(x, bits):
    """x >> bits, of uint64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x):
    x = (x ^ shifted(x, 30)) * signed(0xbf58476d1ce4e5b9)
    x = (x ^ shifted(x, 27)) * signed(0x94d049bb133111eb)
    return x ^ shifted(x, 31)


def row_words(words, line, query):
    """What the pairs of a query share, int64 as query; words: seed and offset, line: batch entry * heads + head."""
    x = mix(words[0] + signed(0x9e3779b97f4a7c15))
    x = mix(x ^ words[1])
    return mix(x ^ (line << 32 | query)) | 1


def key_words(key):
    """What the pairs of a key share, 32 bits in int64."""
    x = (((key + 0x9e3779b9) & LOW) * 0x85ebca6b) & LOW
    x = ((x ^ (x >> 13)) * 0xc2b2ae35) & LOW
    return x ^ (x >> 16)


def kept(work, words, head, row, key):
    """What dropout makes of a weight, [rows, keys]: 0 or 1 / (1 - rate). row [rows, 1], key [keys]."""
    limit = int(as_fp32(work.options["dropout"]) * 2 ** 15 + 0.5)
    shared = row_words(words, head, row)
    pair = ((shared & LOW) * key_words(key) + shifted(shared, 32)) & LOW
    return ((pair >> 16 & 0x7fff) >= limit).double() / (1 - limit / 2 ** 15)


# ---- truth -----------------------------------------------------------------------------------------------------------


def as_fp32(x):
    return torch.tensor(x, dtype=torch.float32).item()


def allowed(work, row, key):
    """[rows, keys]"""
    ends = torch.tensor(work.ends or [work.tokens], device=key.device)
    pairs = torch.bucketize(row, ends, right=True) == torch.bucketize(key, ends, right=True)
    if work.causal:
        pairs &= key <= row
    if work.window:
        pairs &= key >= row - work.window
    return pairs


def scores(work, q, k, head, row, key):
    """Scores [rows, keys], -inf where a pair is not allowed, and their derivative by the scaled product."""
    x, slope = q @ k.T / math.sqrt(work.dim), 1
    if "soft_cap" in work.options:
        cap = as_fp32(work.options["soft_cap"])
        bent = torch.tanh(x / cap)
        x, slope = cap * bent, 1 - bent * bent
    if work.slopes():
        x = x - as_fp32(work.slopes()[head]) * (row - key).abs().double()
    return x.masked_fill(~allowed(work, row, key), -math.inf), slope


def add_rows(exact, work, inputs, head, mine):
    """Some rows of a head, a slice, into their results and into dk and dv."""
    seen = slice(0, mine.stop if work.causal else work.tokens)
    q, dout = inputs.q[0, head, mine].double(), inputs.dout[0, head, mine].double()
    k, v = inputs.k[0, 0, seen].double(), inputs.v[0, 0, seen].double()
    at = torch.arange(work.tokens, device=q.device)
    row, key = at[mine, None], at[seen]
    s, slope = scores(work, q, k, head, row, key)
    lse = torch.logsumexp(s, 1, keepdim=True)
    if inputs.sinks is not None:
        lse = torch.logaddexp(lse, inputs.sinks[head].double())
    p = torch.exp(s - lse)
    keep = kept(work, inputs.words, head, row, key) if inputs.words is not None else 1
    dp = keep * (dout @ v.T)
    delta = (p * dp).sum(1, keepdim=True)
    ds = p * (dp - delta) * slope / math.sqrt(work.dim)
    exact.out[head, mine] = (p * keep) @ v
    exact.lse[head, mine] = lse[:, 0]
    exact.dq[head, mine] = ds @ k
    exact.dk[seen] += ds.T @ q
    exact.dv[seen] += (p * keep).T @ dout
    if inputs.sinks is not None:
        exact.sink_terms[head, mine] = -(torch.exp(inputs.sinks[head].double() - lse) * delta)[:, 0]


def truth(work, inputs, rows=1024):
    """out, lse, dq, dk, dv, and the terms of dsinks, in float64, some rows at a time."""
    group = work.heads // work.kv_heads
    def zeros(*shape):
        return torch.zeros(*shape, dtype=torch.float64, device=inputs.q.device)
    exact = types.SimpleNamespace(
        out=zeros(group, work.tokens, work.value_dim), lse=zeros(group, work.tokens),
        dq=zeros(group, work.tokens, work.dim), dk=zeros(work.tokens, work.dim), dv=zeros(work.tokens, work.value_dim),
        sink_terms=zeros(group, work.tokens))
    for head in range(group):
        for first in range(0, work.tokens, rows):
            add_rows(exact, work, inputs, head, slice(first, min(first + rows, work.tokens)))
    return exact


# ---- errors ----------------------------------------------------------------------------------------------------------


def rms(x):
    return x.double().square().mean().sqrt().item()


def parts(side):
    """Of a side's results what truth has, by name."""
    group = side.work.heads // side.work.kv_heads
    dq, dk, dv = side.gradients
    return {"out": side.out[0, :group], "dq": dq[0, :group], "dk": dk[0, 0], "dv": dv[0, 0]}


def sink_error(side, exact):
    """dsinks is a sum over all tokens, of terms of any sign: its error over the root of the sum of their squares. Truth
    has one batch entry only: 0 where there are more."""
    if getattr(side, "dsinks", None) is None or side.work.batch > 1:
        return 0.0
    wrong = side.dsinks[:len(exact.sink_terms)] - exact.sink_terms.sum(1)
    return rms(wrong / exact.sink_terms.norm(dim=1))


def errors(side, exact):
    """The largest relative RMS error of each pass' results; NaN if one is."""
    found = {name: rms(x - getattr(exact, name)) / rms(getattr(exact, name)) for name, x in parts(side).items()}
    gradients = [found["dq"], found["dk"], found["dv"], sink_error(side, exact)]
    return {"forward": found["out"], "backward": torch.tensor(gradients, dtype=torch.float64).max().item()}
