"""torch_kernels.py - what part of a layer's time its GPU kernels are, by PyTorch's profiler."""
import collections
import math

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


def traced(call, calls):
    """The names and times, in microseconds, of all that runs on the GPU: the profiler sees what any library of the
    process launches."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    return [(e.name, e.time_range.start, e.time_range.end) for e in seen.events() if e.device_type == DeviceType.CUDA]


def busy_time(ranges):
    """How long at least one of the ranges lasts; a kernel may begin before the one in front of it has ended."""
    busy, end = 0, -math.inf
    for first, last in sorted(ranges):
        busy += max(last - max(first, end), 0)
        end = max(end, last)
    return busy


def print_kernels(name, call, calls=16):
    """Each kernel's time a call, and what part of the time of calls one behind the other some kernel is on the GPU, if
    only to wait for the one before it: the rest are gaps. All at one clock."""
    for _ in range(calls):
        call()
    torch.cuda.synchronize()
    seen = traced(call, calls)
    if not seen:
        raise RuntimeError(f"{name}: the profiler sees no kernel")
    found = collections.Counter()
    for kernel, begin, end in seen:
        found[kernel] += (end - begin) / calls
    for kernel, us in found.most_common():
        print(f"{us:12.1f} us  {kernel[:100]}")
    busy = busy_time([(begin, end) for _, begin, end in seen]) / calls
    whole = (max(end for _, _, end in seen) - min(begin for _, begin, _ in seen)) / calls
    print(f"{name}: kernels {busy:.1f} us, the longest {max(found.values()):.1f}, a call {whole:.1f}, "
          f"ratio {busy / whole:.3f}", flush=True)
