/* devices.c - the devices there are: counted, chosen and made, by their kind. */
#include "device.h"
#include "error.h"

usp_status usp_device_create(const usp_host *host, usp_device_kind kind, usp_device **device) {
    if (kind == USP_DEVICE_CPU) return usp_device_create_cpu(host, device);
    if (kind == USP_DEVICE_CUDA) return usp_device_create_cuda(host, device);
    usp_status status = usp_device_count_cuda() > 0 ? usp_device_create_cuda(host, device) : USP_UNSUPPORTED;
    if (status != USP_UNSUPPORTED) return status; /* else there is no GPU, or one that is too old */
    usp_host_log(host, 2, "no usable GPU: the world runs on the CPU");
    return usp_device_create_cpu(host, device);
}

int usp_device_count(usp_device_kind kind) {
    if (kind == USP_DEVICE_CPU) return 1;
    return kind == USP_DEVICE_CUDA ? usp_device_count_cuda() : 0;
}

usp_status usp_device_select(usp_device_kind kind, int index) {
    USP_REQUIRE(kind == USP_DEVICE_CPU || kind == USP_DEVICE_CUDA, "kind is %d: CPU or CUDA", (int)kind);
    USP_REQUIRE(index >= 0 && index < usp_device_count(kind), "index is %d: there are %d such devices", index,
                usp_device_count(kind));
    return kind == USP_DEVICE_CPU ? USP_OK : usp_device_select_cuda(index);
}
