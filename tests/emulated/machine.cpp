/* machine.cpp - see machine.h. */
#include "machine.h"
#include "schedule.h"

#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <ucontext.h>

/* The dynamic shared memory of a block, by the name that kernels declare. */
alignas(1024) unsigned char memory[227 * 1024];

namespace machine {

namespace {

constexpr int STACK = 1 << 17;

struct context {
    ucontext_t begin;
    jmp_buf left;
};

/* Apart from its context, since all are looked at for the next one that can go on. */
struct fiber {
    bool begun = false, done = false;
    int order = 1; /* 0: runs first, 1: by turns, 2: last */
    const char *where = "its start";
    const int *watched = nullptr; /* it waits while the bits of this in `mask` are `number`; nullptr: it does not */
    int mask = 0, number = 0;
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
    std::vector<context> contexts;
    jmp_buf scheduler;
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
usp_schedule schedule = {"by turns", 0, 0, 0, 0, 0, 0};
const void *jobs_at;
bool in_order;                  /* blocks leave no jobs */
std::deque<unsigned> left_jobs; /* to blocks that run later */

unsigned draw(unsigned below) {
    random_state ^= random_state << 13, random_state ^= random_state >> 7, random_state ^= random_state << 17;
    return (unsigned)((random_state >> 11) % below);
}

fiber &self() {
    return now->fibers[(size_t)now->running];
}

bool is_ready(const fiber &f) {
    return !f.done && (!f.watched || (*f.watched & f.mask) != f.number);
}

/* Contexts begin the threads; between them jumps are enough, which ask no system for a signal mask. */
void leave_fiber() {
    if (_setjmp(now->contexts[(size_t)now->running].left) == 0) _longjmp(now->scheduler, 1);
}

void go_on() {
    fiber &f = self();
    if (_setjmp(now->scheduler) != 0) return;
    context &c = now->contexts[(size_t)now->running];
    if (f.begun) _longjmp(c.left, 1);
    f.begun = true;
    setcontext(&c.begin);
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
    fprintf(stderr, "the block waits for ever (%s):", schedule.name);
    for (int i = 0; i < now->threads; i++)
        if (!now->fibers[(size_t)i].done && i % WARP == 0)
            fprintf(stderr, " thread %d at %s,", i, now->fibers[(size_t)i].where);
    fail("deadlock");
}

void set_orders() {
    for (int thread = 0; thread < now->threads; thread++) {
        int warp = thread / WARP, last = (schedule.last >> warp | schedule.last_lanes >> thread % WARP) & 1;
        now->fibers[(size_t)thread].order = last ? 2 : schedule.first >> warp & 1 ? 0 : 1;
    }
}

/* A warp in eight runs first, and one in four last, until the next time. */
void draw_schedule() {
    schedule.first = schedule.last = 0;
    for (int warp = 0; warp * WARP < now->threads; warp++) {
        unsigned kind = draw(8);
        schedule.first |= (uint32_t)(kind == 0) << warp;
        schedule.last |= (uint32_t)(kind == 1 || kind == 2) << warp;
    }
    schedule.last_lanes = draw(4) ? 0 : draw(2) ? 1 : ~1u;
    schedule.at_once = draw(2) == 0;
    schedule.late = !schedule.at_once && draw(2) == 0;
    set_orders();
}

/* The next thread that can go on, from `from` on, of the first order that has one; -1 if there is none. */
int next_ready(int from) {
    int found = -1, best = 3, least = schedule.first ? 0 : 1;
    for (int i = 0, candidate = from; i < now->threads && best > least; i++, candidate++) {
        if (candidate == now->threads) candidate = 0;
        const fiber &f = now->fibers[(size_t)candidate];
        if (f.order < best && is_ready(f)) found = candidate, best = f.order;
    }
    return found;
}

/* Copies come when nothing else can go on but those that run last, or before. */
int choose(int from) {
    if (schedule.drawn && draw(32768) == 0) draw_schedule();
    bool now_and_then = !schedule.late && draw(64) == 0;
    if (!now->copies.empty() && (schedule.at_once || now_and_then)) copy_one(draw((unsigned)now->copies.size()));
    for (;;) {
        int found = next_ready(from);
        if (found >= 0 && (now->fibers[(size_t)found].order < 2 || now->copies.empty())) return found;
        if (now->copies.empty()) tell_deadlock();
        copy_one(schedule.late ? now->copies.size() - 1 : 0);
    }
}

/* Every thread that takes part has called: the round is over. */
void end_round(meeting &m, int count) {
    if (++m.arrived < count) return;
    m.out[m.round & 1] = m.in;
    m.arrived = 0;
    m.round++;
}

/* Goes on when the bits of `watched` in `mask` are no longer `number`. */
void wait_while(const char *where, const int &watched, int mask, int number) {
    fiber &f = self();
    f.where = where, f.watched = &watched, f.mask = mask, f.number = number;
    if (!is_ready(f)) leave_fiber();
    f.watched = nullptr;
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

void maybe_yield() {
    if (draw(4) == 0) leave_fiber();
}

void run_block(int threads, size_t shared, const std::function<void()> &body) {
    static std::vector<std::vector<char>> stacks;
    block b;
    now = &b;
    b.threads = threads, b.body = &body;
    b.shared = shared;
    memset(memory, 0xff, sizeof memory);
    b.fibers.resize((size_t)threads), b.contexts.resize((size_t)threads);
    b.warps.resize((size_t)(threads + WARP - 1) / WARP), b.warpgroups.resize((size_t)(threads + GROUP - 1) / GROUP);
    b.products.resize(b.warpgroups.size()), b.computed.assign(b.warpgroups.size(), 0);
    while ((int)stacks.size() < threads) stacks.emplace_back(STACK);
    for (int i = 0; i < threads; i++) {
        ucontext_t &context = b.contexts[(size_t)i].begin;
        getcontext(&context);
        context.uc_stack.ss_sp = stacks[(size_t)i].data(), context.uc_stack.ss_size = STACK, context.uc_link = nullptr;
        makecontext(&context, enter_fiber, 0);
    }
    set_orders();
    if (schedule.drawn) draw_schedule();
    for (int left = threads, at = 0; left > 0; at = (at + 1) % threads) {
        if (draw(16) == 0) at = (int)draw((unsigned)threads);
        b.running = at = choose(at);
        go_on();
        left -= self().done;
    }
    if (!b.copies.empty()) fail("a copy is under way when the block ends");
    now = nullptr;
}

/* ---- jobs -------------------------------------------------------------------------------------------------------- */

void begin_jobs(void *next) {
    jobs_at = next;
    left_jobs.clear();
}

bool are_jobs(const void *next) {
    return next == jobs_at;
}

unsigned next_job(unsigned *next, bool last_block) {
    while (schedule.spread && !in_order && !last_block && draw(2)) left_jobs.push_back((*next)++);
    if (!last_block || left_jobs.empty()) return (*next)++;
    unsigned job = left_jobs.front();
    left_jobs.pop_front();
    return job;
}

/* ---- meetings ---------------------------------------------------------------------------------------------------- */

const std::vector<uint64_t> &gather(const char *where, int group_of, uint64_t word) {
    int index = thread() / group_of;
    meeting &m = (group_of == WARP ? now->warps : now->warpgroups)[(size_t)index];
    int round = m.round;
    m.in.resize((size_t)group_of);
    m.in[(size_t)(thread() % group_of)] = word;
    end_round(m, group_of);
    wait_while(where, m.round, ~0, round);
    return m.out[round & 1];
}

void barrier(int id, int threads, bool waits) {
    meeting &m = now->named[id];
    int round = m.round;
    end_round(m, threads);
    if (waits) wait_while("a barrier", m.round, ~0, round);
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
    wait_while("an mbarrier", a.phase, 1, parity);
}

bool is_over(void *at, int parity) {
    maybe_yield();
    return (arrivals_at(at).phase & 1) != parity;
}

void await_above(const int *at, int least) {
    while (*at <= least) wait_while("a number that a block publishes", *at, ~0, *at);
}

/* ---- what is under way ------------------------------------------------------------------------------------------- */

void start_copy(const std::function<void()> &copy) {
    now->copies.push_back(copy);
}

/* Computes a warpgroup's products up to this number. */
static void compute_up_to(int group, int number) {
    for (int &i = now->computed[(size_t)group]; i < number; i++) {
        const joint_product &next = now->products[(size_t)group][(size_t)i];
        if (next.seen != GROUP) fail("a product is not issued by all threads of the warpgroup");
        multiply(next.of, now->shared);
    }
}

void issue(const product &p) {
    int group = thread() / GROUP;
    auto &list = now->products[(size_t)group];
    size_t index = (size_t)self().issued++;
    if (list.size() == index) list.emplace_back();
    list[index].of[thread() % GROUP] = p;
    if (++list[index].seen == GROUP && schedule.at_once) compute_up_to(group, (int)index + 1);
}

void end_products() {
    self().groups.push_back(self().issued);
}

void await_products(int left) {
    int group = thread() / GROUP, done = (int)self().groups.size() - left;
    int upto = done > 0 ? self().groups[(size_t)done - 1] : 0;
    uint64_t place = (uint64_t)(uintptr_t)__builtin_return_address(0);
    for (uint64_t other : gather("its products", GROUP, place))
        if (other != place) fail("warps of a group wait for products at different places");
    compute_up_to(group, upto);
}

} /* namespace machine */

void usp_emulated_schedule(const usp_schedule *schedule, uint64_t seed) {
    machine::schedule = *schedule;
    machine::random_state = 88172645463325252u ^ seed * 0x9e3779b97f4a7c15u;
}

void usp_emulated_in_order(int yes) {
    machine::in_order = yes;
}
