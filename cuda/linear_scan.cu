/* linear_scan.cu - the exclusive scan over states that turns every block's own sum into the state before the block.
 * A thread walks all states of a group for a few elements of one head; nothing is exchanged between threads.
 * For sm_80 and up. */
#include "linear.cuh"

static constexpr unsigned threads_per_block = USP_SCAN_THREADS;
static constexpr int ahead = 8;           /* states read before the first of them is needed */
static constexpr int most_groups = 65535; /* of one launch: what a grid takes in y */

/* The first step whose group is not before `group`. */
static __device__ __forceinline__ int group_begin(const usp_scan &scan, int group) {
    int low = 0, high = scan.states;
    while (low < high) {
        int middle = (low + high) / 2;
        if (scan.step[middle].group < group)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* `anew`: what came before, be it a NaN, does not count. */
static __device__ __forceinline__ void step(float &x, float decay, bool anew, float total) {
    x = anew ? total : decay * x + total;
}

static __device__ __forceinline__ void step(float4 &x, float decay, bool anew, const float4 &total) {
    step(x.x, decay, anew, total.x);
    step(x.y, decay, anew, total.y);
    step(x.z, decay, anew, total.z);
    step(x.w, decay, anew, total.w);
}

/* Where state `index` lies in data. */
static __device__ __forceinline__ int place_of(const usp_scan &scan, int index) {
    return scan.place ? scan.place[index] : index;
}

/* The next `ahead` states of a group in the order of the scan, the rows of each, and where documents begin in time. */
template <typename V> struct batch {
    V total[ahead];
    int length[ahead], anew[ahead];
};

/* States first, first + direction, ... of which `left` are left. */
template <typename V>
static __device__ __forceinline__ void read_batch(batch<V> &to, const V *data, const usp_scan &scan, int64_t state,
                                                  int first, int direction, int left) {
#pragma unroll
    for (int j = 0; j < ahead; j++) {
        if (j >= left) break;
        to.total[j] = data[place_of(scan, first + j * direction) * state];
        const usp_scan_step &from = scan.step[first + j * direction];
        to.length[j] = from.length;
        to.anew[j] = direction > 0 ? from.begins : from.ends;
    }
}

/* V: float, or float4 where the elements of a state are a multiple of four. Grid: (elements of a state, groups from
 * `first_group` on). */
template <typename V>
static __global__ void __launch_bounds__(threads_per_block) scan_states(usp_scan scan, int first_group) {
    begin_kernel();
    int64_t vectors = scan.elements / static_cast<int64_t>(sizeof(V) / sizeof(float)); /* of one head */
    int64_t state = vectors * scan.heads * scan.batch, at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at >= state) return;
    float log2_decay = usp_log2_decay(scan.log_decay, static_cast<int>(at / vectors % scan.heads));
    int group = first_group + blockIdx.y, begin = group_begin(scan, group);
    int count = group_begin(scan, group + 1) - begin;
    int index = scan.reverse ? begin + count - 1 : begin, direction = scan.reverse ? -1 : 1;
    V *data = reinterpret_cast<V *>(scan.data) + at, x = {};
    batch<V> now, next;
    if (scan.initial) x = reinterpret_cast<const V *>(scan.initial)[group * state + at];
    read_batch(next, data, scan, state, index, direction, count);
    for (int left = count; left > 0; left -= ahead) {
        now = next;
        read_batch(next, data, scan, state, index + ahead * direction, direction, left - ahead);
#pragma unroll
        for (int j = 0; j < ahead; j++) {
            if (j >= left) break;
            data[place_of(scan, index) * state] = x;
            step(x, usp_decay(log2_decay, now.length[j]), now.anew[j], now.total[j]);
            index += direction;
        }
    }
    if (scan.final) reinterpret_cast<V *>(scan.final)[group * state + at] = x;
}

/* ---- launcher ---------------------------------------------------------------------------------------------------- */

static bool aligned(const void *memory) {
    return (reinterpret_cast<uintptr_t>(memory) & 15) == 0;
}

usp_status usp_cuda_linear_scan(const usp_scan *scan, usp_stream stream) {
    bool four = scan->elements % 4 == 0 && aligned(scan->data) && aligned(scan->initial) && aligned(scan->final);
    int64_t units = scan->elements * scan->heads * scan->batch / (four ? 4 : 1);
    if (units == 0) return USP_OK;
    for (int first = 0; first < scan->groups; first += most_groups) {
        int groups = scan->groups - first < most_groups ? scan->groups - first : most_groups;
        dim3 grid(static_cast<unsigned>((units + threads_per_block - 1) / threads_per_block), groups);
        USP_TRY(usp_cuda_launch("linear_scan", four ? scan_states<float4> : scan_states<float>, grid,
                                dim3(threads_per_block), 0, stream, *scan, first));
    }
    return USP_OK;
}
