/* hopper.cuh - what Hopper (sm_90a) does beside arithmetic, each as a verb: copies of tiles that arrive at a barrier,
 * products that a warpgroup issues and waits for, barriers among some warps, registers given and taken. PTX ISA 8.0 and
 * up, sections "mbarrier", "cp.async.bulk", "cp.async.bulk.tensor", "cp.reduce.async.bulk.tensor", "wgmma",
 * "setmaxnreg", "bar", "membar/fence", "prefetch", "ld", "st". (griddepcontrol is in launch.cuh, for every GPU.) */
#ifndef USP_CUDA_HOPPER_CUH
#define USP_CUDA_HOPPER_CUH
#include <cuda.h>

#include "hopper_products.cuh"
#include "machine.cuh"

/* ---- arrival barriers (mbarrier) --------------------------------------------------------------------------------- */

/* A phase ends when `count` threads have arrived and all bytes that were announced are there. A wait names the phase by
 * its parity: the first one is 0. */
typedef uint64_t arrivals;

static __device__ __forceinline__ void begin_arrivals(arrivals *at, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(at)), "r"(count) : "memory");
}

/* Between begin_arrivals and the first copy that names one of them; __syncthreads must follow. */
static __device__ __forceinline__ void publish_arrivals() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

static __device__ __forceinline__ void arrive(arrivals *at) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(at)) : "memory");
}

/* Arrives, and announces bytes that copies will bring. */
static __device__ __forceinline__ void arrive_with(arrivals *at, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(at)), "r"(bytes)
                 : "memory");
}

static __device__ __forceinline__ void await(arrivals *at, int parity) {
    asm volatile("{ .reg .pred done;\n"
                 "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again; }" ::"r"(shared_address(at)),
                 "r"(parity)
                 : "memory");
}

/* Whether a wait would be over at once. */
static __device__ __forceinline__ bool is_over(arrivals *at, int parity) {
    int over;
    asm volatile("{ .reg .pred over;\n"
                 "mbarrier.test_wait.parity.shared::cta.b64 over, [%1], %2;\n"
                 "selp.s32 %0, 1, 0, over; }"
                 : "=r"(over)
                 : "r"(shared_address(at)), "r"(parity)
                 : "memory");
    return over;
}

/* ---- copies of tiles (TMA) --------------------------------------------------------------------------------------- */

/* A tensor as copies see it: [batch][head][token][dim], boxes of 64 elements of so many tokens. */
typedef CUtensorMap tile_map;

/* Starts copying the box that begins at (element, token, head, batch); what lies outside of the tensor is zeros. Rows
 * are 128 bytes, their 16-byte chunks swizzled by row & 7; `to` is at a multiple of 1024 bytes. */
static __device__ __forceinline__ void copy_box(uint32_t to, const tile_map *map, int element, int token, int head,
                                                int batch, arrivals *at) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
                 " [%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(to),
                 "l"(map), "r"(element), "r"(token), "r"(head), "r"(batch), "r"(shared_address(at))
                 : "memory");
}

/* Starts adding a box of fp32 sums in shared memory, of 32 elements of so many tokens, swizzled as copy_box does, to
 * the tensor, in any order among blocks; what lies outside of the tensor is left out. */
static __device__ __forceinline__ void add_box(const tile_map *map, int element, int token, int head, int batch,
                                               uint32_t from) {
    asm volatile("cp.reduce.async.bulk.tensor.4d.global.shared::cta.add.tile.bulk_group"
                 " [%0, {%1, %2, %3, %4}], [%5];" ::"l"(map),
                 "r"(element), "r"(token), "r"(head), "r"(batch), "r"(from)
                 : "memory");
}

/* Starts writing a box of 64 elements of so many tokens to the tensor, as add_box does. */
static __device__ __forceinline__ void store_box(const tile_map *map, int element, int token, int head, int batch,
                                                 uint32_t from) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group"
                 " [%0, {%1, %2, %3, %4}], [%5];" ::"l"(map),
                 "r"(element), "r"(token), "r"(head), "r"(batch), "r"(from)
                 : "memory");
}

/* Ends a group of boxes that this thread adds or writes; groups are read, and complete, in order. */
static __device__ __forceinline__ void end_boxes() {
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

/* Waits until no more than LEFT groups of this thread are still to be read from shared memory. */
template <int LEFT> static __device__ __forceinline__ void await_reads() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(LEFT) : "memory");
}

/* Brings a line of memory nearer, for a load soon. */
static __device__ __forceinline__ void fetch_ahead(const void *line) {
    asm volatile("prefetch.global.L1 [%0];" ::"l"(line));
}

/* Waits until all boxes of this thread have been added or written. */
static __device__ __forceinline__ void await_boxes() {
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

/* What this thread stored in shared memory is seen by copies and products; a barrier must follow. */
static __device__ __forceinline__ void publish_stores() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/* ---- shared memory ----------------------------------------------------------------------------------------------- */

/* By a warp: four blocks of 8 x 8 16-bit elements as an accumulator has them. Lanes 8 i to 8 i + 7 give the addresses
 * of the rows of block i. (PTX ISA, "stmatrix".) */
static __device__ __forceinline__ void store_blocks(uint32_t address, const uint32_t (&block)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(block[0]),
                 "r"(block[1]), "r"(block[2]), "r"(block[3])
                 : "memory");
}

/* ---- order among blocks ------------------------------------------------------------------------------------------ */

/* Tells other blocks a number in memory: boxes of this thread that it awaited, and what it wrote, come before. */
static __device__ __forceinline__ void publish(int *to, int number) {
    asm volatile("fence.proxy.async.global;\n"
                 "st.release.gpu.global.s32 [%0], %1;" ::"l"(to),
                 "r"(number)
                 : "memory");
}

/* Waits until a number that other blocks publish is above `least`; boxes of this thread come after. */
static __device__ __forceinline__ void await_above(const int *at, int least) {
    int number;
    do asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(number) : "l"(at) : "memory");
    while (number <= least);
    asm volatile("fence.proxy.async.global;" ::: "memory");
}

/* ---- products of a warpgroup (wgmma) ----------------------------------------------------------------------------- */

/* Describes a tile of swizzled rows of 128 bytes (64 elements) `offset` bytes behind a shared address. `slab`: bytes
 * from these 64 columns to the next 64, where columns are what the product does not sum over; else it is not read. */
static __device__ __forceinline__ uint64_t describe(uint32_t address, uint32_t slab, uint32_t offset) {
    constexpr uint32_t swizzle_128 = 1u << 30, eight_rows = 1024 >> 4;
    uint32_t low = (slab >> 4 << 16 | address >> 4) + (offset >> 4); /* an addition of what is known when compiled */
    return (uint64_t)(swizzle_128 | eight_rows) << 32 | low;
}

/* Describes rows of 16 bytes (8 elements), one behind the other, that stand for 16 columns: both halves are alike. */
static __device__ __forceinline__ uint64_t describe_narrow(uint32_t address) {
    constexpr uint32_t eight_rows = 128 >> 4;
    return (uint64_t)eight_rows << 32 | address >> 4;
}

/* Before the first product after registers that it reads were written. */
static __device__ __forceinline__ void begin_products() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

/* Ends a group of products; groups complete in order. */
static __device__ __forceinline__ void end_products() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

/* Waits until no more than LEFT groups are under way. */
template <int LEFT> static __device__ __forceinline__ void await_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

/* The compiler must neither move nor copy these registers across here: products under way write them. */
template <int N> static __device__ __forceinline__ void pin(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}

template <int N> static __device__ __forceinline__ void pin(uint32_t (&a)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+r"(a[i])::"memory");
}

/* What follows from x is computed anew behind here, rather than kept in registers. */
static __device__ __forceinline__ void pin(uint32_t &x) {
    asm volatile("" : "+r"(x));
}

/* The other way round: behind here a pointer is kept, rather than computed anew. */
static __device__ __forceinline__ void pin(float *&x) {
    asm volatile("" : "+l"(x));
}

/* x is known before what is stored behind here. */
static __device__ __forceinline__ void pin(float &x) {
    asm volatile("" : "+f"(x)::"memory");
}

/* ---- warps ------------------------------------------------------------------------------------------------------- */

/* True in one lane of a warp, of which all are here, always the same one: groups of copies are a thread's own. Its
 * branch is known to have one thread, so that copies need no loop over lanes. (PTX ISA, "elect.sync".) */
static __device__ __forceinline__ bool is_leader() {
    uint32_t chosen;
    asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }" : "=r"(chosen));
    return chosen != 0;
}

/* Barrier `id` from 1 on among `threads` threads: waits for all, or arrives and goes on. */
static __device__ __forceinline__ void meet(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

static __device__ __forceinline__ void pass(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

/* A lane's number, the same in all lanes, and known to be. */
template <typename Number> static __device__ __forceinline__ Number uniform(Number x, int lane = 0) {
    return __shfl_sync(~0u, x, lane);
}

/* All warps of a warpgroup: each thread has so many registers from now on. */
template <int COUNT> static __device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <int COUNT> static __device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

#endif
