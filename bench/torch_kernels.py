"""torch_kernels.py - what part of a layer's time its GPU kernels are, by PyTorch's profiler."""
import collections

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


def kernel_times(call, calls):
    """Microseconds a call of everything that runs on the GPU, by its name: the profiler sees what any library of the
    process launches."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    found = collections.Counter()
    for event in seen.events():
        if event.device_type == DeviceType.CUDA:
            found[event.name] += event.time_range.elapsed_us() / calls
    return found


def call_time(call, calls):
    """Microseconds of a call among calls one behind the other, without the profiler."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        call()
    end.record()
    torch.cuda.synchronize()
    return 1e3 * begin.elapsed_time(end) / calls


def print_kernels(name, call, calls=16):
    """Each kernel's time, their sum, the call's time, and the sum over it: the call's rate over that of its kernels."""
    call_time(call, calls)
    whole = call_time(call, calls)
    kernels = kernel_times(call, calls)
    for kernel, us in kernels.most_common():
        print(f"{us:12.1f} us  {kernel[:100]}")
    total = sum(kernels.values())
    print(f"{name}: kernels {total:.1f} us, a call {whole:.1f} us, ratio {total / whole:.3f}", flush=True)
