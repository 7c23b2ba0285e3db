/* machine.cpp - see machine.h. */
#include "machine.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <ucontext.h>

/* The dynamic shared memory of a block, by the name that kernels declare. */
alignas(1024) unsigned char memory[227 * 1024];

namespace machine {

namespace {

constexpr int GROUP = 128, WARP = 32, STACK = 1 << 17;

struct fiber {
    ucontext_t context;
    bool done = false;
    const char *where = "its start";
    std::function<bool()> ready;
    std::vector<int> groups; /* numbers of products at the end of each group */
    int issued = 0;
};

struct meeting {
    int arrived = 0, round = 0;
    std::vector<uint64_t> in, out[2];
};

struct arrivals {
    int count, pending, phase = 0;
    long bytes = 0;
};

/* The product of a warpgroup, from all its threads. */
struct joint_product {
    product of[GROUP];
    int seen = 0;
};

struct block {
    int threads = 0, running = 0;
    std::vector<fiber> fibers;
    ucontext_t scheduler;
    size_t shared = 0;
    std::map<void *, arrivals> barriers;
    meeting named[16];
    std::vector<meeting> warps, warpgroups;
    std::vector<std::vector<joint_product>> products;
    std::vector<int> computed;
    std::deque<std::function<void()>> copies;
    const std::function<void()> *body = nullptr;
};

block *now;
uint64_t random_state = 88172645463325252u;

unsigned draw(unsigned below) {
    random_state ^= random_state << 13, random_state ^= random_state >> 7, random_state ^= random_state << 17;
    return (unsigned)((random_state >> 11) % below);
}

fiber &self() {
    return now->fibers[(size_t)now->running];
}

void leave_fiber() {
    swapcontext(&self().context, &now->scheduler);
}

void enter_fiber() {
    (*now->body)();
    self().done = true;
    leave_fiber();
}

void copy_one(size_t index) {
    std::function<void()> copy = now->copies[index];
    now->copies.erase(now->copies.begin() + (long)index);
    copy();
}

void tell_deadlock() {
    fprintf(stderr, "the block waits for ever:");
    for (int i = 0; i < now->threads; i++)
        if (!now->fibers[(size_t)i].done && i % WARP == 0)
            fprintf(stderr, " thread %d at %s,", i, now->fibers[(size_t)i].where);
    fail("deadlock");
}

/* The next thread that can go on, from `from` on; copies come when nothing else can, or before. */
int choose(int from) {
    if (!now->copies.empty() && draw(64) == 0) copy_one(draw((unsigned)now->copies.size()));
    for (int i = 0; i < now->threads; i++) {
        int candidate = (from + i) % now->threads;
        fiber &f = now->fibers[(size_t)candidate];
        if (!f.done && (!f.ready || f.ready())) return candidate;
    }
    if (now->copies.empty()) tell_deadlock();
    copy_one(0);
    return choose(from);
}

/* Every thread that takes part has called: the round is over. */
void end_round(meeting &m, int count) {
    if (++m.arrived < count) return;
    m.out[m.round & 1] = m.in;
    m.arrived = 0;
    m.round++;
}

} /* namespace */

/* ---- threads ----------------------------------------------------------------------------------------------------- */

void fail(const char *what) {
    fprintf(stderr, "thread %d: %s\n", now->running, what);
    abort();
}

int thread() {
    return now->running;
}

unsigned char *shared_memory() {
    return memory;
}

uint32_t shared_address_of(const void *at) {
    return (uint32_t)((const unsigned char *)at - memory);
}

void wait_for(const char *where, const std::function<bool()> &ready) {
    if (ready()) return;
    self().where = where;
    self().ready = ready;
    leave_fiber();
}

void maybe_yield() {
    if (draw(4) != 0) return;
    self().ready = nullptr;
    leave_fiber();
}

void run_block(int threads, size_t shared, const std::function<void()> &body) {
    static std::vector<std::vector<char>> stacks;
    block b;
    now = &b;
    b.threads = threads, b.body = &body;
    b.shared = shared;
    memset(memory, 0xff, sizeof memory);
    b.fibers.resize((size_t)threads);
    b.warps.resize((size_t)(threads + WARP - 1) / WARP), b.warpgroups.resize((size_t)(threads + GROUP - 1) / GROUP);
    b.products.resize(b.warpgroups.size()), b.computed.assign(b.warpgroups.size(), 0);
    while ((int)stacks.size() < threads) stacks.emplace_back(STACK);
    for (int i = 0; i < threads; i++) {
        ucontext_t &context = b.fibers[(size_t)i].context;
        getcontext(&context);
        context.uc_stack.ss_sp = stacks[(size_t)i].data(), context.uc_stack.ss_size = STACK, context.uc_link = nullptr;
        makecontext(&context, enter_fiber, 0);
    }
    for (int left = threads, at = 0; left > 0; at = (at + 1) % threads) {
        if (draw(16) == 0) at = (int)draw((unsigned)threads);
        b.running = at = choose(at);
        self().ready = nullptr;
        swapcontext(&b.scheduler, &self().context);
        left -= self().done;
    }
    if (!b.copies.empty()) fail("a copy is under way when the block ends");
    now = nullptr;
}

/* ---- meetings ---------------------------------------------------------------------------------------------------- */

const std::vector<uint64_t> &gather(const char *where, int group_of, uint64_t word) {
    int index = thread() / group_of;
    meeting &m = (group_of == WARP ? now->warps : now->warpgroups)[(size_t)index];
    int round = m.round;
    m.in.resize((size_t)group_of);
    m.in[(size_t)(thread() % group_of)] = word;
    end_round(m, group_of);
    wait_for(where, [&m, round] { return m.round != round; });
    return m.out[round & 1];
}

void barrier(int id, int threads, bool waits) {
    meeting &m = now->named[id];
    int round = m.round;
    end_round(m, threads);
    if (waits) wait_for("a barrier", [&m, round] { return m.round != round; });
}

static arrivals &arrivals_at(void *at) {
    auto found = now->barriers.find(at);
    if (found == now->barriers.end()) fail("no such mbarrier");
    return found->second;
}

static void end_phase(arrivals &a) {
    if (a.pending < 0) fail("more arrivals at an mbarrier than it counts");
    if (a.pending > 0 || a.bytes != 0) return;
    a.phase++;
    a.pending = a.count;
}

void begin_arrivals(void *at, int count) {
    now->barriers[at] = {count, count};
}

void arrive(void *at, int bytes_announced) {
    arrivals &a = arrivals_at(at);
    a.bytes += bytes_announced;
    a.pending--;
    end_phase(a);
    maybe_yield();
}

void bytes_arrived(void *at, int bytes) {
    arrivals &a = arrivals_at(at);
    a.bytes -= bytes;
    end_phase(a);
}

void await(void *at, int parity) {
    arrivals &a = arrivals_at(at);
    wait_for("an mbarrier", [&a, parity] { return (a.phase & 1) != parity; });
}

/* ---- what is under way ------------------------------------------------------------------------------------------- */

void start_copy(const std::function<void()> &copy) {
    now->copies.push_back(copy);
}

/* An element of a tile in shared memory, swizzled by 128 bytes. `inner`: along the 128-byte rows. */
static float element(const product &p, uint64_t tile, bool inner_is_other, int other, int k) {
    uint32_t base = (uint32_t)(tile & 0x3fff) << 4, slab = (uint32_t)(tile >> 16 & 0x3fff) << 4;
    uint32_t eight_rows = (uint32_t)(tile >> 32 & 0x3fff) << 4;
    int inner = inner_is_other ? other : k, outer = inner_is_other ? k : other;
    uint32_t at = base + (uint32_t)(inner / 64) * slab + (uint32_t)(outer / 8) * eight_rows;
    at += (uint32_t)(outer % 8) * 128 + (uint32_t)(inner % 64) * 2;
    at ^= (at >> 7 & 7) << 4;
    uint16_t word;
    if (at + 2 > now->shared) fail("a product reads behind shared memory");
    memcpy(&word, memory + at, 2);
    return p.decode(word);
}

/* The row and column of word i of thread t's sums. */
static int row_of(int t, int i) {
    return t / WARP * 16 + t % WARP / 4 + i / 2 % 2 * 8;
}

static int column_of(int t, int i) {
    return i / 4 * 8 + 2 * (t % 4) + i % 2;
}

static void read_left(const joint_product &j, float left[64][16]) {
    for (int t = 0; t < GROUP; t++)
        for (int i = 0; i < 8 && j.of[0].left; i++) {
            uint32_t pair = j.of[t].left[i / 2];
            int row = t / WARP * 16 + t % WARP / 4 + i / 2 % 2 * 8, column = 2 * (t % 4) + i / 4 * 8 + i % 2;
            left[row][column] = j.of[0].decode((uint16_t)(i % 2 ? pair >> 16 : pair));
        }
    for (int m = 0; m < 64 && !j.of[0].left; m++)
        for (int k = 0; k < 16; k++) left[m][k] = element(j.of[0], j.of[0].left_tile, j.of[0].left_by_columns, m, k);
}

static void compute(const joint_product &j) {
    static float left[64][16], right[16][256];
    const product &p = j.of[0];
    if (j.seen != GROUP) fail("a product is not issued by all threads of the warpgroup");
    read_left(j, left);
    for (int n = 0; n < p.words * 2; n++)
        for (int k = 0; k < 16; k++) right[k][n] = element(p, p.right_tile, p.right_by_columns, n, k);
    for (int t = 0; t < GROUP; t++)
        for (int i = 0; i < p.words; i++) {
            float sum = p.add ? j.of[t].sums[i] : 0;
            for (int k = 0; k < 16; k++) sum += left[row_of(t, i)][k] * right[k][column_of(t, i)];
            j.of[t].sums[i] = sum;
        }
}

void issue(const product &p) {
    auto &list = now->products[(size_t)(thread() / GROUP)];
    size_t index = (size_t)self().issued++;
    if (list.size() == index) list.emplace_back();
    list[index].of[thread() % GROUP] = p;
    list[index].seen++;
}

void end_products() {
    self().groups.push_back(self().issued);
}

void await_products(int left) {
    int group = thread() / GROUP, done = (int)self().groups.size() - left;
    int upto = done > 0 ? self().groups[(size_t)done - 1] : 0;
    gather("its products", GROUP, 0);
    for (int &i = now->computed[(size_t)group]; i < upto; i++) compute(now->products[(size_t)group][(size_t)i]);
}

} /* namespace machine */
