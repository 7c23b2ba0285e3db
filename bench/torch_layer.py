"""torch_layer.py - the example of embedding the library from Python: usp.h by ctypes, and a layer on PyTorch's tensors.

    with one_rank("build/libusp.so", torch.device("cuda")) as (library, mesh):
        layer = Layer(library, mesh, q, k, v, dout, mask=CAUSAL)   # [batch, heads, tokens, dim], any strides
        layer.forward()                                            # on PyTorch's current stream: layer.out
        layer.backward()                                           # layer.gradients: dq, dk, dv
        layer.close()

Tensors go in by data_ptr() and strides, without a copy; workspace and saved are tensors too."""
import contextlib
import ctypes
from ctypes import POINTER, Structure, byref, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p

import torch

# ---- usp.h -----------------------------------------------------------------------------------------------------------

ON_CPU, ON_CUDA = 1, 2
SOFTMAX = 1
CAUSAL, FULL = 1, 2
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class Tensor(Structure):
    _fields_ = [("data", c_void_p), ("batch", c_int64), ("token", c_int64), ("head", c_int64)]


class Sized(Structure):
    """A struct that begins with its size; what is not given is 0."""

    def __init__(self, **fields):
        super().__init__(struct_size=ctypes.sizeof(self), **fields)


class WorldConfig(Sized):
    _fields_ = ([("struct_size", c_size_t)] +
                [(name, c_int) for name in ("device", "timeout_ms", "watchdog", "node")] +
                [(name, c_void_p) for name in ("log", "log_user", "host_alloc", "host_free", "host_user")] +
                [("silence_ms", c_int), ("transport", c_int)])


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
                ("dlse", c_int), ("max_logit", c_int), ("shared_memory", c_int), ("slopes", POINTER(c_float))]


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


# ---- a layer ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def one_rank(path, device):
    """The library at `path`, and a mesh of one rank on the torch device, for as long as it is needed."""
    if device.type == "cuda":
        if device.index is not None:
            torch.cuda.set_device(device)
        torch.empty(1, device=device)  # makes its context
    library = Library(path)
    config = WorldConfig(device=ON_CUDA if device.type == "cuda" else ON_CPU)
    world = library.make("world_create_env", byref(config))
    mesh = library.make("mesh_create", world, 1, 1)
    try:
        yield library, mesh
    finally:
        library.calls.usp_mesh_destroy(mesh)
        library.calls.usp_world_destroy(world)


def view(x):
    """A tensor [batch, heads, tokens, dim] of any strides but that dim is dense."""
    return Tensor(x.data_ptr(), x.stride(0), x.stride(2), x.stride(1))


def address(x):
    return x.data_ptr() if x is not None else None


def aligned(size, device):
    """`size` bytes at a multiple of 256: (what owns them, their address)."""
    memory = torch.empty(size + 256, dtype=torch.uint8, device=device)
    return memory, memory.data_ptr() + -memory.data_ptr() % 256


class Layer:
    """A softmax layer on one rank for these tensors: q [batch, heads, tokens, head_dim], k [batch, kv_heads, tokens,
    head_dim], v [batch, kv_heads, tokens, value_dim], dout as out: [batch, heads, tokens, value_dim]. `ends`: where
    packed documents end. `sinks`: fp32 [heads]. `words`: int64 [2], seed and offset of dropout. `slopes`: a list.
    Further fields of usp_layer_config by name."""

    def __init__(self, library, mesh, q, k, v, dout, ends=None, sinks=None, words=None, slopes=None, **fields):
        self.library, self.q, self.k, self.v, self.dout = library, q, k, v, dout
        self.sinks, self.words, self.dsinks = sinks, words, None if sinks is None else torch.empty_like(sinks)
        self.sequence = self.make_sequence(mesh, q.shape[2], ends)
        self.layer = self.make_layer(mesh, slopes, fields)
        sizes = Sizes()
        library.layer_get_sizes(self.layer, byref(sizes))
        self.bytes = max(sizes.forward, sizes.backward)
        self.memory, self.workspace = aligned(self.bytes, q.device)
        self.saved_memory, self.saved = aligned(sizes.saved, q.device)
        self.out = torch.full_like(dout, float("nan"))
        self.gradients = [torch.full_like(x, float("nan")) for x in (q, k, v)]
        self.lse = torch.full(q.shape[:3], float("nan"), device=q.device) if fields.get("return_lse") else None
        self.describe_calls()

    def make_sequence(self, mesh, tokens, ends):
        array = (c_int64 * len(ends))(*ends) if ends else None
        config = SequenceConfig(tokens=tokens, documents=len(ends or []), document_ends=array)
        return self.library.make("sequence_create", mesh, byref(config))

    def make_layer(self, mesh, slopes, fields):
        if slopes:
            fields = dict(fields, slopes=(c_float * len(slopes))(*slopes))
        config = LayerConfig(attention=SOFTMAX, dtype=DTYPES[self.q.dtype], batch=self.q.shape[0],
                             heads=self.q.shape[1], kv_heads=self.k.shape[1], head_dim=self.q.shape[3],
                             value_dim=self.v.shape[3], sinks=self.sinks is not None, **fields)
        return self.library.make("layer_create", mesh, self.sequence, byref(config))

    def describe_calls(self):
        given = dict(q=view(self.q), k=view(self.k), v=view(self.v), out=view(self.out), sinks=address(self.sinks),
                     dropout_state=address(self.words), saved=self.saved)
        self.forward_args = Forward(lse=address(self.lse), **given)
        dq, dk, dv = self.gradients
        self.backward_args = Backward(dout=view(self.dout), dq=view(dq), dk=view(dk), dv=view(dv),
                                      dsinks=address(self.dsinks), **given)

    @property
    def stream(self):
        return c_void_p(torch.cuda.current_stream(self.q.device).cuda_stream if self.q.is_cuda else None)

    def forward(self):
        self.library.layer_forward(self.layer, byref(self.forward_args), c_void_p(self.workspace),
                                   c_size_t(self.bytes), self.stream)

    def backward(self):
        self.library.layer_backward(self.layer, byref(self.backward_args), c_void_p(self.workspace),
                                    c_size_t(self.bytes), self.stream)

    def close(self):
        self.library.calls.usp_layer_destroy(self.layer)
        self.library.calls.usp_sequence_destroy(self.sequence)
