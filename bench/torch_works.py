"""torch_works.py - the works that compare_torch.py times: shapes, masks, options, pairs, FLOPs, and random inputs."""
import dataclasses
import types

import torch

# ---- a work ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Work:
    """Attention of `batch` sequences of `tokens`, with the layer's options by their names in usp_layer_config ("slopes"
    and "sinks" as 1). A window is a number of keys before the query; ends are those of packed documents."""
    name: str
    tokens: int
    heads: int
    kv_heads: int = 0
    dim: int = 128
    value_dim: int = 0
    causal: bool = True
    window: int = 0
    ends: list = None
    dtype: torch.dtype = torch.bfloat16
    batch: int = 0
    options: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        self.kv_heads = self.kv_heads or self.heads
        self.value_dim = self.value_dim or self.dim
        self.batch = self.batch or (1 if self.ends else max(1, 16384 // self.tokens))

    def lengths(self):
        """Tokens of each document."""
        ends = self.ends or [self.tokens]
        return [end - begin for begin, end in zip([0] + ends[:-1], ends)]

    def pairs_of(self, length):
        if not self.causal:
            return length * length
        reach = min(self.window + 1, length) if self.window else length
        return reach * (reach + 1) // 2 + (length - reach) * reach

    def pairs(self):
        """Allowed pairs of one head of one batch entry."""
        return sum(self.pairs_of(length) for length in self.lengths())

    def flops(self, call):
        """Of allowed pairs: two products forward, five backward."""
        each = 3 * self.dim + 2 * self.value_dim if call == "backward" else self.dim + self.value_dim
        return 2.0 * each * self.pairs() * self.heads * self.batch

    def plain(self):
        return not (self.window or self.ends or self.options)

    def slopes(self):
        """Of each head, or None."""
        return [2 ** (-8 * (h + 1) / self.heads) for h in range(self.heads)] if "slopes" in self.options else None


def packed_ends(tokens, shortest, longest):
    """Documents whose lengths are even in their logarithm, the last one cut."""
    generator, ends = torch.Generator().manual_seed(7), []
    while not ends or ends[-1] < tokens:
        length = shortest * (longest / shortest) ** torch.rand((), generator=generator).item()
        ends.append(min(tokens, (ends[-1] if ends else 0) + int(length)))
    return ends


def smaller(work, tokens):
    """The same with so many tokens, one batch entry and a window and documents to match: to try the program."""
    return dataclasses.replace(work, tokens=tokens, batch=1, window=min(work.window, tokens // 4),
                               ends=packed_ends(tokens, 8, tokens // 2) if work.ends else None)


def own_peer(work):
    """What part of the library's own rate a work reaches: (name of the peer, its work), or None."""
    def other(**changes):
        return dataclasses.replace(work, name=work.name + ", own peer", **changes)
    if work.ends:
        length = mean_length(work)
        return "libusp, causal", other(ends=None, tokens=length, batch=max(1, round(work.tokens / length)))
    if work.window:
        return "libusp, causal", other(window=0)
    if "deterministic" in work.options:
        return "libusp, not deterministic", other(options={})
    if work.options:
        return "libusp, plain", other(options={})
    return ("libusp, bf16", other(dtype=torch.bfloat16)) if work.dtype == torch.float16 else None


def mean_length(work):
    """Of documents, each as often as it has pairs."""
    return round(sum(n * work.pairs_of(n) for n in work.lengths()) / work.pairs())


# ---- all of them -----------------------------------------------------------------------------------------------------


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
    works += [Work(f"d128 {name} causal 16:16 16K", 16 * k, 16, options={name: value})
              for name, value in (("sinks", 1), ("soft_cap", 50.0), ("dropout", 0.1), ("slopes", 1))]
    return works + [Work(f"d128 deterministic causal 16:16 {s}K", s * k, 16, options={"deterministic": 1})
                    for s in (4, 16)]


def draw(work, device, seed=1):
    """Normal inputs, the same for the same shape and seed: q, k, v, dout [batch, heads, tokens, dim] over [batch,
    tokens, heads, dim] in memory; sinks fp32 [heads] and dropout's seed and offset int64 [2], where the work has
    them, else None."""
    torch.manual_seed(seed)
    def normal(heads, dim):
        x = torch.randn(work.batch, work.tokens, heads, dim, device=device)
        return x.to(work.dtype).transpose(1, 2)
    return types.SimpleNamespace(
        q=normal(work.heads, work.dim), k=normal(work.kv_heads, work.dim), v=normal(work.kv_heads, work.value_dim),
        dout=normal(work.heads, work.value_dim),
        sinks=torch.randn(work.heads, device=device) if "sinks" in work.options else None,
        words=torch.tensor([17, 4], device=device) if "dropout" in work.options else None)
