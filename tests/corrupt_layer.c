/* corrupt_layer.c - preloaded into usp_bench: makes every forward result wrong by one percent in one element a row.
 * So check_tools.sh can see that a wrong result is found and changes the exit status; CPU and f32 only. */
#include <dlfcn.h>
#include <string.h>
#include <usp.h>

enum { HEADS = 2, TOKENS = 64 }; /* of the run under test, on one rank */

usp_status usp_layer_forward(usp_layer *layer, const usp_forward *args, void *workspace, size_t bytes,
                             usp_stream stream) {
    usp_status (*real)(usp_layer *, const usp_forward *, void *, size_t, usp_stream);
    void *symbol = dlsym(RTLD_NEXT, "usp_layer_forward");
    memcpy(&real, &symbol, sizeof real);
    usp_status status = real(layer, args, workspace, bytes, stream);
    float *out = args->out.data;
    for (int64_t token = 0; token < TOKENS; token++)
        for (int64_t head = 0; head < HEADS; head++)
            out[token * args->out.stride_token + head * args->out.stride_head] *= 1.01f;
    return status;
}
