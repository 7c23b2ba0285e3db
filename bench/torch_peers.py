"""torch_peers.py - the sides of a comparison: a libusp layer, PyTorch's attention, FlashAttention-3 where it is.

A side has a name, its work and inputs, forward() and backward(), which leave out and gradients (dq, dk, dv), all
[batch, heads, tokens, dim], lse [batch, heads, tokens] or None, and close(). One that cannot serve the work raises
RuntimeError in one of the passes."""
import torch
import torch.nn.functional as functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from torch_layer import CAUSAL, FULL, Layer
from torch_works import draw, own_peer


class Ours(Layer):
    def __init__(self, library, mesh, work, inputs, name="libusp", **fields):
        self.name, self.work, self.inputs = name, work, inputs
        fields |= {key: value for key, value in work.options.items() if key not in ("slopes", "sinks")}
        super().__init__(library, mesh, inputs.q, inputs.k, inputs.v, inputs.dout, ends=work.ends, sinks=inputs.sinks,
                         words=inputs.words, slopes=work.slopes(), mask=CAUSAL if work.causal else FULL,
                         window_left=work.window, **fields)


class Torch:
    """scaled_dot_product_attention by one backend; plain masks only."""

    def __init__(self, work, inputs, backend, name):
        self.work, self.inputs, self.backend, self.name = work, inputs, backend, name
        self.leaves = [x.detach().clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]

    def forward(self):
        q, k, v = self.leaves
        with sdpa_kernel(self.backend):
            self.out = functional.scaled_dot_product_attention(q, k, v, is_causal=self.work.causal,
                                                               enable_gqa=self.work.heads != self.work.kv_heads)

    def backward(self):
        self.gradients = torch.autograd.grad(self.out, self.leaves, self.inputs.dout, retain_graph=True)

    @property
    def lse(self):
        """[batch, heads, tokens] by the backend's own operator, which gives it."""
        q, k, v = (x.detach() for x in self.leaves)
        aten, causal = torch.ops.aten, self.work.causal
        if self.backend == SDPBackend.CUDNN_ATTENTION:
            return aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal)[1].squeeze(-1)
        if self.backend == SDPBackend.FLASH_ATTENTION and q.is_cuda:
            return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)[1]
        return None

    def close(self):
        pass


class Flash3:
    name, lse = "FlashAttention-3", None

    def __init__(self, work, inputs, attend):
        self.work, self.inputs, self.attend = work, inputs, attend
        self.leaves = [x.detach().transpose(1, 2).clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
        self.dout = inputs.dout.transpose(1, 2).contiguous()

    def forward(self):
        window = (self.work.window or -1, -1)
        out = self.attend(*self.leaves, causal=self.work.causal, window_size=window,
                          softcap=self.work.options.get("soft_cap", 0.0))
        self.result = out[0] if isinstance(out, tuple) else out
        self.out = self.result.transpose(1, 2)

    def backward(self):
        gradients = torch.autograd.grad(self.result, self.leaves, self.dout, retain_graph=True)
        self.gradients = [x.transpose(1, 2) for x in gradients]

    def close(self):
        pass


def cudnn(work, inputs):
    """PyTorch's own kernels in its place on the CPU, to try the programs."""
    if inputs.q.is_cuda:
        return Torch(work, inputs, SDPBackend.CUDNN_ATTENTION, "torch SDPA, cuDNN")
    return Torch(work, inputs, SDPBackend.MATH, "torch SDPA, math")


def flash2(work, inputs):
    return Torch(work, inputs, SDPBackend.FLASH_ATTENTION, "torch SDPA, FlashAttention-2")


def flash3(work, inputs):
    """None where it is not installed or has no such work."""
    try:
        from flash_attn_interface import flash_attn_func
    except ImportError:
        return None
    serves = inputs.q.is_cuda and not work.ends and set(work.options) <= {"soft_cap"}
    return Flash3(work, inputs, flash_attn_func) if serves else None


def peers_of(library, mesh, work, inputs, with_flash2):
    """All that a work is compared with."""
    peers = [cudnn(work, inputs)] if work.plain() else []
    if work.plain() and with_flash2:
        peers.append(flash2(work, inputs))
    own = own_peer(work)
    if own:
        peers.append(Ours(library, mesh, own[1], draw(own[1], inputs.q.device), own[0]))
    third = flash3(work, inputs)
    return peers + [third] if third else peers


def serving(sides, complain):
    """Those sides that have run both passes; complain(side, reason) of others."""
    ready = []
    for side in sides:
        try:
            side.forward()
            side.backward()
            ready.append(side)
        except RuntimeError as reason:
            complain(side, reason)
            side.close()
    return ready
