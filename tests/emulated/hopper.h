/* hopper.h - the verbs of cuda/hopper.cuh, cuda/hopper_products.cuh, cuda/machine.cuh and cuda/launch.cuh, and what a
 * CUDA compiler knows by itself, on the emulated machine. A kernel's file is compiled behind it, for the CPU. */
#ifndef USP_TESTS_EMULATED_HOPPER_H
#define USP_TESTS_EMULATED_HOPPER_H
#include <algorithm>
#include <cmath>
#include <cstring>
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <deque>
#include <functional>
#include <map>
#include <type_traits>
#include <vector>

#include "machine.h"

/* The real ones are not read. */
#define USP_CUDA_HOPPER_CUH
#define USP_CUDA_HOPPER_PRODUCTS_CUH
#define USP_CUDA_MACHINE_CUH
#define USP_CUDA_LAUNCH_CUH

/* ---- what a CUDA compiler knows ---------------------------------------------------------------------------------- */

#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__
#define __noinline__

#define __log2f log2f

using std::isfinite;

static inline int min(int a, int b) {
    return a < b ? a : b;
}
static inline int max(int a, int b) {
    return a > b ? a : b;
}
static inline unsigned min(unsigned a, unsigned b) {
    return a < b ? a : b;
}

struct emulated_index {
    unsigned x, y, z;
};
inline emulated_index blockIdx, gridDim, blockDim;

/* threadIdx.x is asked of the machine. */
struct emulated_thread {
    struct {
        operator unsigned() const {
            return (unsigned)machine::thread();
        }
    } x;
};
static const emulated_thread threadIdx = {};

static inline void __syncthreads() {
    machine::barrier(0, (int)blockDim.x, true);
}
static inline int __syncthreads_or(int) {
    machine::fail("__syncthreads_or is not emulated");
}
static inline void __syncwarp() {
    machine::gather("its warp", 32, 0);
}
static inline bool __any_sync(unsigned, bool mine) {
    for (uint64_t word : machine::gather("its warp", 32, mine))
        if (word) return true;
    return false;
}
static inline bool __all_sync(unsigned all, bool mine) {
    return !__any_sync(all, !mine);
}
static inline unsigned __ballot_sync(unsigned, bool mine) {
    const std::vector<uint64_t> &words = machine::gather("its warp", 32, mine);
    unsigned all = 0;
    for (size_t lane = 0; lane < words.size(); lane++) all |= words[lane] ? 1u << lane : 0;
    return all;
}
static inline int __reduce_min_sync(unsigned, int mine) {
    int least = mine;
    for (uint64_t word : machine::gather("its warp", 32, (uint64_t)mine)) least = std::min(least, (int)word);
    return least;
}
static inline int __reduce_max_sync(unsigned all, int mine) {
    return -__reduce_min_sync(all, -mine);
}
static inline int __ffs(int bits) {
    return __builtin_ffs(bits);
}
static inline unsigned __float_as_uint(float x) {
    unsigned bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
static inline float __uint_as_float(unsigned bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
template <typename T> static inline T emulated_shuffle(T mine, int lane) {
    uint64_t word = 0;
    T theirs;
    memcpy(&word, &mine, sizeof mine);
    memcpy(&theirs, &machine::gather("its warp", 32, word)[(size_t)lane], sizeof theirs);
    return theirs;
}
template <typename T> static inline T __shfl_xor_sync(unsigned, T mine, int mask) {
    return emulated_shuffle(mine, (machine::thread() % 32) ^ mask);
}
static inline void __threadfence_block() {
    machine::maybe_yield();
}
static inline size_t __cvta_generic_to_shared(const void *memory) {
    return machine::shared_address_of(memory);
}
static inline float __fdividef(float a, float b) {
    return a / b;
}
static inline unsigned __sad(int a, int b, unsigned c) {
    return (unsigned)abs(a - b) + c;
}
template <typename T> static inline T __ldg(const T *from) {
    return *from;
}
template <typename T> static inline T atomicAdd(T *to, T x) {
    T old = *to;
    *to += x;
    return old;
}
static inline unsigned atomicAdd(unsigned *to, unsigned x) {
    if (machine::are_jobs(to)) return machine::next_job(to, blockIdx.x + 1 == gridDim.x);
    return atomicAdd<unsigned>(to, x);
}

#include "../../cuda/common.cuh"

/* ---- machine.cuh ------------------------------------------------------------------------------------------------- */

static inline uint32_t shared_address(const void *memory) {
    return machine::shared_address_of(memory);
}
static inline uint4 load_shared(uint32_t address) {
    uint4 x;
    memcpy(&x, machine::shared_memory() + address, sizeof x);
    return x;
}
static inline uint32_t load_shared_word(uint32_t address) {
    uint32_t x;
    memcpy(&x, machine::shared_memory() + address, sizeof x);
    return x;
}
static inline void store_shared(uint32_t address, uint32_t x) {
    memcpy(machine::shared_memory() + address, &x, sizeof x);
}
static inline void store_shared_pair(uint32_t address, float x, float y) {
    if (address % 8) machine::fail("a pair is not at an 8-byte boundary");
    memcpy(machine::shared_memory() + address, &x, sizeof x);
    memcpy(machine::shared_memory() + address + 4, &y, sizeof y);
}
static inline float fast_exp2(float x) {
    return exp2f(x);
}
static inline float fast_reciprocal(float x) {
    return 1 / x;
}
template <typename T> static inline uint32_t pack_positive(float low, float high) {
    return usp_pack<T>(low < 0 ? 0 : low, high < 0 ? 0 : high);
}
static inline uint32_t halves_below(uint32_t first, uint32_t second, uint32_t limits) {
    if ((limits & 0xffff) > 0x7c00 || limits >> 16 > 0x7c00) machine::fail("a limit of numbers is no float");
    bool low = (first >> 16 & 0x7fff) < (limits & 0xffff), high = (second >> 16 & 0x7fff) < limits >> 16;
    return (low ? 0xffffu : 0) | (high ? 0xffff0000u : 0);
}
template <typename T> static inline uint32_t usp_taint(uint32_t taint, uint32_t pair) {
    float2 x = usp_unpack<T>(pair);
    return taint | !isfinite(x.x) | !isfinite(x.y);
}

/* ---- hopper.cuh -------------------------------------------------------------------------------------------------- */

typedef uint64_t arrivals;

static inline void begin_arrivals(arrivals *at, int count) {
    machine::begin_arrivals(at, count);
}
static inline void publish_arrivals() {
}
static inline void arrive(arrivals *at) {
    machine::arrive(at, 0);
}
static inline void arrive_with(arrivals *at, int bytes) {
    machine::arrive(at, bytes);
}
static inline void await(arrivals *at, int parity) {
    machine::await(at, parity);
}
static inline bool is_over(arrivals *at, int parity) {
    return machine::is_over(at, parity);
}

/* What the emulated driver writes in the place of a CUtensorMap. */
typedef struct emulated_map {
    const char *data;
    int64_t extent[4], stride[3], rows;
} emulated_map;
typedef CUtensorMap tile_map;
static_assert(sizeof(emulated_map) <= sizeof(tile_map), "one has room for the other");

static inline void prefetch_map(const tile_map *) {
}
static inline void copy_box(uint32_t to, const tile_map *map, int element, int token, int head, int batch,
                            arrivals *at) {
    emulated_map m;
    memcpy(&m, map, sizeof m);
    if (to % 1024) machine::fail("a box does not begin at a multiple of 1024 bytes");
    machine::start_copy([=] {
        for (int row = 0; row < m.rows; row++)
            for (int column = 0; column < 64; column++) {
                uint32_t place = to + (uint32_t)row * 128 + (uint32_t)column * 2;
                uint16_t word = 0;
                if (element + column < m.extent[0] && token + row < m.extent[1])
                    memcpy(&word,
                           m.data + (element + column) * 2 + (token + row) * m.stride[0] + head * m.stride[1] +
                               batch * m.stride[2],
                           2);
                memcpy(machine::shared_memory() + (place ^ (place >> 7 & 7) << 4), &word, 2);
            }
        machine::bytes_arrived(at, (int)m.rows * 128);
    });
}
static inline void publish_stores() {
}

/* Blocks run one after the other: what is awaited was published, or this block will. */
static inline void publish(int *to, int number) {
    *to = number;
}
static inline void await_above(const int *at, int least) {
    machine::await_above(at, least);
}

static inline uint64_t describe(uint32_t address, uint32_t slab, uint32_t offset) {
    constexpr uint32_t swizzle_128 = 1u << 30, eight_rows = 1024 >> 4;
    uint32_t low = (slab >> 4 << 16 | address >> 4) + (offset >> 4);
    return (uint64_t)(swizzle_128 | eight_rows) << 32 | low;
}

static inline uint64_t describe_narrow(uint32_t address) {
    constexpr uint32_t eight_rows = 128 >> 4;
    return (uint64_t)eight_rows << 32 | address >> 4;
}

template <typename T> static float emulated_decode(uint16_t word) {
    T x;
    memcpy(&x, &word, 2);
    return usp_to_float(x);
}
template <typename T, bool BY_COLUMNS, bool LEFT_BY_COLUMNS = false, int N>
static inline void issue_product(float (&d)[N], uint64_t a, uint64_t b, bool add) {
    machine::issue({N, d, nullptr, a, b, add, LEFT_BY_COLUMNS, BY_COLUMNS, emulated_decode<T>});
}
template <typename T, bool BY_COLUMNS, int N>
static inline void issue_product(float (&d)[N], const uint32_t (&a)[4], uint64_t b, bool add) {
    machine::issue({N, d, a, 0, b, add, false, BY_COLUMNS, emulated_decode<T>});
}
static inline void begin_products() {
}
static inline void end_products() {
    machine::end_products();
}
/* In place: the machine looks at where it is called. */
template <int LEFT> __attribute__((always_inline)) static inline void await_products() {
    machine::await_products(LEFT);
}
template <typename T, int N> static inline void pin(T (&)[N]) {
}
static inline void pin(uint32_t &) {
}
static inline void pin(float &) {
}
static inline void pin(float *&) {
}

/* Boxes are read from shared memory as late as may be: when their thread waits for it. */
typedef std::deque<std::vector<std::function<void()>>> emulated_boxes;
static std::map<int, emulated_boxes> boxes_of; /* by thread */

static inline emulated_boxes &own_boxes() {
    emulated_boxes &own = boxes_of[machine::thread()];
    if (own.empty()) own.emplace_back();
    return own;
}
/* Calls visit(element in memory, its address in shared memory) for each of a box whose rows are 128 bytes. */
template <typename T, typename Visit>
static inline void emulated_box(const tile_map *map, int element, int token, int head, int batch, uint32_t from,
                                const Visit &visit) {
    emulated_map m;
    memcpy(&m, map, sizeof m);
    if (from % 1024) machine::fail("a box does not begin at a multiple of 1024 bytes");
    own_boxes().back().push_back([=] {
        for (int row = 0; row < m.rows && token + row < m.extent[1]; row++)
            for (int column = 0; column < 128 / (int)sizeof(T) && element + column < m.extent[0]; column++) {
                uint32_t place = from + (uint32_t)row * 128 + (uint32_t)(column * (int)sizeof(T));
                visit((T *)(m.data + (element + column) * (int)sizeof(T) + (token + row) * m.stride[0] +
                            head * m.stride[1] + batch * m.stride[2]),
                      machine::shared_memory() + (place ^ (place >> 7 & 7) << 4));
            }
    });
}
static inline void add_box(const tile_map *map, int element, int token, int head, int batch, uint32_t from) {
    emulated_box<float>(map, element, token, head, batch, from, [](float *to, const unsigned char *at) {
        float x;
        memcpy(&x, at, 4);
        *to += x;
    });
}
static inline void store_box(const tile_map *map, int element, int token, int head, int batch, uint32_t from) {
    emulated_box<uint16_t>(map, element, token, head, batch, from,
                           [](uint16_t *to, const unsigned char *at) { memcpy(to, at, 2); });
}
static inline void end_boxes() {
    own_boxes().emplace_back();
}
template <int LEFT> static inline void await_reads() {
    for (emulated_boxes &own = own_boxes(); own.size() > LEFT + 1; own.pop_front())
        for (auto &write : own.front()) write();
}
static inline void fetch_ahead(const void *) {
}
static inline void await_boxes() {
    await_reads<0>();
}

static inline void meet(int id, int threads) {
    machine::barrier(id, threads, true);
}
static inline void pass(int id, int threads) {
    machine::barrier(id, threads, false);
}
template <typename Number> static inline Number uniform(Number x, int lane = 0) {
    return emulated_shuffle(x, lane);
}
template <int COUNT> static inline void give_registers() {
}
template <int COUNT> static inline void take_registers() {
}
/* Any lane, as long as it is the same one. */
static inline bool is_leader() {
    machine::gather("its warp", 32, 0);
    return threadIdx.x % 32 == 5;
}
static inline void store_blocks(uint32_t address, const uint32_t (&block)[4]) {
    int lane = threadIdx.x % 32;
    if (address % 16) machine::fail("the row of a block is not at a 16-byte boundary");
    for (int i = 0; i < 4; i++) store_shared(emulated_shuffle(address, i * 8 + lane / 4) + lane % 4 * 4, block[i]);
}

/* ---- launch.cuh -------------------------------------------------------------------------------------------------- */

/* One block after the other. */
template <typename... Parameters, typename... Arguments>
static usp_status usp_cuda_launch(const char *, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared,
                                  usp_stream, Arguments &&...arguments) {
    gridDim = {grid.x, grid.y, grid.z}, blockDim = {block.x, block.y, block.z};
    for (unsigned i = 0; i < grid.x * grid.y; i++) {
        blockIdx = {i % grid.x, i / grid.x, 0};
        machine::run_block((int)block.x, shared, [&] { kernel(arguments...); });
    }
    return USP_OK;
}

/* What is cleared before a launch is where its blocks ask for jobs. */
extern "C" inline usp_status usp_cuda_clear(int *words, int64_t count, usp_stream) {
    memset(words, 0, (size_t)count * sizeof *words);
    machine::begin_jobs(words);
    return USP_OK;
}
static inline void begin_kernel() {
}

#endif
