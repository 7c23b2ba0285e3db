/* machine.h - one thread block of a Hopper GPU on the CPU: threads are fibers that run until they wait. Copies and
 * products happen as late as they may, in an order drawn at random: what reads too early, or writes too early, reads
 * or spoils something wrong. A block that waits for ever is told, with where each warp waits. Knows no kernel. */
#ifndef USP_TESTS_EMULATED_MACHINE_H
#define USP_TESTS_EMULATED_MACHINE_H
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <vector>

namespace machine {

/* ---- threads ----------------------------------------------------------------------------------------------------- */

/* Runs a block of so many threads with so many bytes of shared memory, poisoned. Ends the program on a deadlock. */
void run_block(int threads, size_t shared, const std::function<void()> &body);
int thread(); /* of the block; the one that runs */
unsigned char *shared_memory();
uint32_t shared_address_of(const void *memory);
/* Lets others run first, now and then. */
void maybe_yield();
/* For mistakes of the kernel. */
[[noreturn]] void fail(const char *what);

/* ---- jobs -------------------------------------------------------------------------------------------------------- */

/* Blocks of a launch that begins will ask here for jobs, each for the next number of its own. */
void begin_jobs(void *next);
bool are_jobs(const void *next);
unsigned next_job(unsigned *next, bool last_block);

/* ---- meetings ---------------------------------------------------------------------------------------------------- */

/* `count` threads of a group bring a word each and see all: a warp, or a warpgroup. */
const std::vector<uint64_t> &gather(const char *where, int group_of, uint64_t word);
/* Named barriers: bar.sync and bar.arrive. */
void barrier(int id, int threads, bool waits);

/* mbarrier. */
void begin_arrivals(void *at, int count);
void arrive(void *at, int bytes_announced);
void bytes_arrived(void *at, int bytes);
void await(void *at, int parity);
bool is_over(void *at, int parity);
/* A number in memory that threads raise. */
void await_above(const int *at, int least);

/* ---- what is under way ------------------------------------------------------------------------------------------- */

/* A copy, at any time from now on. */
void start_copy(const std::function<void()> &copy);

constexpr int GROUP = 128, WARP = 32; /* threads of a warpgroup, of a warp */

/* One product of a warpgroup, as each of its threads sees it: sums of `words` floats, the left operand in registers or
 * in shared memory. Nothing is read or written before the group of products has been waited for. */
struct product {
    int words;
    float *sums;
    const uint32_t *left; /* NULL: `left_tile` */
    uint64_t left_tile, right_tile;
    bool add, left_by_columns, right_by_columns;
    float (*decode)(uint16_t);
};
void issue(const product &product);
void end_products();
/* By all threads of the warpgroup at one place of the program, as PTX demands of its ".aligned" instructions. */
void await_products(int left);
/* What one is, at once: `of` as all threads see it, with so many bytes of shared memory. */
void multiply(const product (&of)[GROUP], size_t shared);

} /* namespace machine */

#endif
