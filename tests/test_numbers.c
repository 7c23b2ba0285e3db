/* test_numbers.c - what a layer costs, counted: launches and messages whatever the number of documents, bytes on the
 * ring by mask and route, tensor work against one rank's, memory. Looks at no result and at no clock. */
#include "expect.h"
#include "layer.h"
#include "stage.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { SECONDS = 240 };

/* ---- launches and messages --------------------------------------------------------------------------------------- */

/* Tables that count and pass on to the true ones. */
typedef struct counter {
    usp_device_ops device; /* first: what the device points to */
    const usp_device_ops *true_device;
    int64_t launches;
} counter;

typedef struct line_counter {
    usp_transport_ops transport; /* first: what the transport points to */
    const usp_transport_ops *true_comm;
    int64_t messages;
} line_counter;

static const usp_device_ops *launch(usp_device *device) {
    counter *c = (counter *)(uintptr_t)device->ops;
    c->launches++;
    return c->true_device;
}

static usp_status count_copies(usp_device *device, const usp_copy *copies, int count, usp_stream stream) {
    return launch(device)->copy_rows(device, copies, count, stream);
}

static usp_status count_forward(usp_device *device, const usp_softmax *args, usp_stream stream) {
    return launch(device)->softmax_forward(device, args, stream);
}

static usp_status count_totals(usp_device *device, const usp_linear *args, usp_stream stream) {
    return launch(device)->linear_totals(device, args, stream);
}

static usp_status count_exchange(usp_transport *transport, int lane, const usp_message *sends, int send_count,
                                 const usp_message *recvs, int recv_count, usp_stream stream) {
    line_counter *c = (line_counter *)(uintptr_t)transport->ops;
    c->messages += send_count + recv_count;
    return c->true_comm->exchange(transport, lane, sends, send_count, recvs, recv_count, stream);
}

typedef struct counts {
    int64_t launches, messages;
    usp_sizes sizes;
} counts;

/* One forward of a case with so many documents of one length. */
static int count_one(usp_rank *rank, const usp_case *c, int64_t documents, counts *seen) {
    usp_device *device = rank->world->device;
    usp_transport *transport = rank->world->transport;
    int64_t *ends = malloc((size_t)documents * sizeof *ends);
    counter here = {.device = *device->ops, .true_device = device->ops};
    line_counter there = {.transport = *transport->ops, .true_comm = transport->ops};
    usp_stage stage;
    usp_case roomy = *c;
    roomy.max_documents = (int)documents;
    for (int64_t d = 0; d < documents; d++) ends[d] = (d + 1) * c->tokens / documents;
    here.device.copy_rows = count_copies;
    here.device.softmax_forward = count_forward;
    here.device.linear_totals = count_totals;
    there.transport.exchange = count_exchange;
    int failed = usp_stage_open(rank, &roomy, &stage) != USP_OK ||
                 usp_sequence_replan(stage.sequence, documents, ends, NULL) != USP_OK || usp_stage_fill(&stage);
    free(ends);
    if (failed) return usp_say(rank, "%s", usp_last_error());
    device->ops = &here.device;
    transport->ops = &there.transport;
    failed = usp_stage_forward(&stage, 1);
    device->ops = here.true_device;
    transport->ops = there.true_comm;
    *seen = (counts){here.launches, there.messages, stage.sizes};
    usp_stage_close(&stage);
    usp_count(rank);
    return failed;
}

static int few_launches(usp_rank *rank, void *argument) {
    const usp_case c = {.tokens = 16384, .mask = USP_MASK_CAUSAL, .ulysses = 4, .head_dim = 8, .heads = 8};
    counts one, many;
    (void)argument;
    if (count_one(rank, &c, 1, &one) || count_one(rank, &c, 512, &many)) return 1;
    if (one.launches > 3 || one.messages > 44)
        usp_say(rank, "%lld launches and %lld messages", (long long)one.launches, (long long)one.messages);
    if (many.launches != one.launches || many.messages != one.messages)
        usp_say(rank, "512 documents: %lld launches and %lld messages, one: %lld and %lld", (long long)many.launches,
                (long long)many.messages, (long long)one.launches, (long long)one.messages);
    return 0;
}

/* States are as many as chunks. Their number follows the documents on the per-document layout alone, and there too no
 * further than to 2N + 1 zigzags: more memory, and the same messages and launches. */
static int few_states(usp_rank *rank, void *argument) {
    const int *layout = argument;
    const usp_case c = {.attention = USP_LINEAR,
                        .tokens = 16384,
                        .layout = (usp_layout)*layout,
                        .documents = 6,
                        .mask = USP_MASK_CAUSAL,
                        .ring = 4,
                        .decay = 1,
                        .heads = 4,
                        .head_dim = 32};
    counts one, many;
    if (count_one(rank, &c, 1, &one) || count_one(rank, &c, 512, &many)) return 1;
    size_t tenths = c.layout == USP_LAYOUT_ZIGZAG_PER_DOCUMENT ? 16 : 12;
    if (many.messages != one.messages || many.launches != one.launches ||
        many.sizes.forward_workspace > one.sizes.forward_workspace * tenths / 10)
        usp_say(rank, "512 documents: %lld messages and %zu bytes, one: %lld and %zu", (long long)many.messages,
                many.sizes.forward_workspace, (long long)one.messages, one.sizes.forward_workspace);
    return 0;
}

Test(numbers, launches_and_messages_do_not_grow_with_documents) {
    usp_expect_ranks(4, SECONDS, few_launches, NULL);
    int layouts[] = {USP_LAYOUT_ZIGZAG, USP_LAYOUT_CONTIGUOUS, USP_LAYOUT_ZIGZAG_PER_DOCUMENT};
    for (int i = 0; i < 3; i++) usp_expect_ranks(4, SECONDS, few_states, &layouts[i]);
}

/* ---- bytes on the ring ------------------------------------------------------------------------------------------- */

enum { TOKENS = 65536, RING = 8 };

/* Bytes that this rank receives on the ring in one forward. */
static int ring_bytes(usp_rank *rank, const usp_case *c, const int64_t *ends, int64_t documents, int64_t *bytes) {
    usp_mesh *mesh = NULL;
    usp_sequence *sequence = NULL;
    usp_layer *layer = NULL;
    usp_case_configs *configs = malloc(sizeof *configs);
    usp_case complete = usp_case_complete(*c);
    usp_cost cost = {.struct_size = sizeof cost};
    usp_case_configure(&complete, rank->rank, RING, configs);
    configs->sequence.documents = documents;
    configs->sequence.document_ends = documents ? ends : NULL;
    int failed = usp_mesh_create(rank->world, 1, RING, &mesh) != USP_OK ||
                 usp_sequence_create(mesh, &configs->sequence, &sequence) != USP_OK ||
                 usp_layer_create(mesh, sequence, &configs->layer, &layer) != USP_OK ||
                 usp_layer_get_cost(layer, USP_PASS_FORWARD, &cost) != USP_OK;
    *bytes = cost.ring_recv;
    usp_layer_destroy(layer);
    usp_sequence_destroy(sequence);
    usp_mesh_destroy(mesh);
    free(configs);
    usp_count(rank);
    return failed ? usp_say(rank, "%s", usp_last_error()) : 0;
}

/* Keys outside of this rank's that any of its queries sees through a window, zigzag. */
static int64_t keys_in_window(int rank, int64_t window) {
    int64_t chunk = TOKENS / (2 * RING), keys = 0;
    for (int64_t key = 0; key < TOKENS; key++) {
        int64_t owner = key / chunk < RING ? key / chunk : 2 * RING - 1 - key / chunk;
        int seen = 0;
        for (int i = 0; i < 2; i++) {
            int64_t begin = (i ? 2 * RING - 1 - rank : rank) * chunk;
            seen |= key >= begin - window && key < begin + chunk;
        }
        keys += seen && owner != rank;
    }
    return keys;
}

static int bytes_by_mask(usp_rank *rank, void *argument) {
    const int64_t row = 2 * 8 * 4 * 4, window = 4096; /* k and v of 4 heads of 8, f32 */
    usp_case c = {.tokens = TOKENS, .mask = USP_MASK_CAUSAL};
    int64_t relay, direct, seen, home, ends[RING];
    (void)argument;
    for (int i = 0; i < RING; i++) ends[i] = (i + 1) * TOKENS / RING;
    c.route = USP_ROUTE_RELAY;
    if (ring_bytes(rank, &c, NULL, 0, &relay)) return 1;
    c.route = USP_ROUTE_DIRECT;
    if (ring_bytes(rank, &c, NULL, 0, &direct)) return 1;
    c.route = USP_ROUTE_AUTO;
    c.window_left = window;
    if (ring_bytes(rank, &c, NULL, 0, &seen)) return 1;
    c.window_left = 0;
    c.layout = USP_LAYOUT_CONTIGUOUS;
    if (ring_bytes(rank, &c, ends, RING, &home)) return 1;
    if (seen != keys_in_window(rank->rank, window) * row)
        usp_say(rank, "a window brings %lld bytes, its queries need %lld", (long long)seen,
                (long long)(keys_in_window(rank->rank, window) * row));
    if (home != 0) usp_say(rank, "documents at home bring %lld bytes", (long long)home);
    int64_t chunk = TOKENS / (2 * RING) * row, all = (RING - 1) * 2 * chunk;
    if (relay != all || direct != all - rank->rank * chunk)
        usp_say(rank, "%lld bytes by relay and %lld directly, not %lld and %lld", (long long)relay, (long long)direct,
                (long long)all, (long long)(all - rank->rank * chunk));
    return 0;
}

/* Directly rank r leaves out the late halves of the r ranks before it: over all ranks a quarter. */
Test(numbers, bytes_are_what_queries_see) {
    usp_expect_ranks(RING, SECONDS, bytes_by_mask, NULL);
}

/* ---- tensor work ------------------------------------------------------------------------------------------------- */

typedef struct packed {
    int64_t shortest, longest;
    double busiest; /* N times the busiest rank's work over the only one's, at most; 0: whatever it is */
    usp_layout layout;
    int64_t count, ends[4096];
    double work[2][RING]; /* of the only rank; of every rank */
} packed;

static void draw(packed *p) {
    uint64_t state = 7;
    for (int64_t at = 0; at < TOKENS;) {
        double unit = usp_random_below(&state, 1000000) / 1e6;
        at += (int64_t)((double)p->shortest * pow((double)p->longest / (double)p->shortest, unit));
        p->ends[p->count++] = at < TOKENS ? at : TOKENS;
    }
}

/* 128 rows by 64 columns at a time, over all stages. */
static double tiles_of(const usp_plan *plan) {
    double tiles = 0;
    for (int t = 0; t < plan->route.stages; t++) {
        usp_tiles list = usp_plan_tiles(plan, &plan->host, t, 0);
        for (int w = 0; w < list.count->works; w++)
            for (int i = 0; i < list.work[w].tiles; i++) {
                const usp_tile *tile = &list.tile[list.work[w].first_tile + i];
                tiles += (tile->end - tile->begin + 63) / 64;
            }
    }
    return tiles;
}

static int measure_work(usp_rank *rank, void *argument) {
    packed *p = argument;
    usp_mesh *mesh = NULL;
    usp_sequence *sequence = NULL;
    usp_sequence_config config = {.struct_size = sizeof config,
                                  .layout = p->layout,
                                  .tokens = TOKENS,
                                  .documents = p->count,
                                  .document_ends = p->ends};
    int failed = usp_mesh_create(rank->world, 1, rank->size, &mesh) != USP_OK ||
                 usp_sequence_create(mesh, &config, &sequence) != USP_OK;
    for (int ulysses = 1; ulysses <= rank->size && !failed; ulysses *= 2) {
        int ring = rank->size / ulysses;
        usp_shape shape = {{ulysses, ring, rank->rank % ulysses, rank->rank / ulysses},
                           USP_SOFTMAX,
                           usp_rule_of(USP_MASK_CAUSAL, 0, 0, USP_ALIGN_TOP_LEFT),
                           USP_ROUTE_AUTO};
        usp_plan *plan = NULL;
        failed = usp_plan_acquire(sequence, &shape, &plan) != USP_OK;
        if (failed) break;
        p->work[rank->size > 1][rank->rank] = rank->rank % ulysses == 0 ? tiles_of(plan) : 0;
        usp_plan_release(sequence, plan);
        usp_stage stage = {.rank = rank, .mesh = mesh};
        double all[RING], sum = 0, most = 0;
        failed = usp_stage_share(&stage, &p->work[rank->size > 1][rank->rank], sizeof(double), all);
        for (int r = 0; r < rank->size; r++) sum += all[r], most = fmax(most, all[r]);
        if (rank->size == 1 || rank->rank != 0) continue;
        if (sum > 1.001 * p->work[0][0] || (p->busiest && most * ring > p->busiest * p->work[0][0]))
            usp_say(rank, "U%d R%d, documents of %lld to %lld: %g tiles, at most %g a rank; one rank has %g", ulysses,
                    ring, (long long)p->shortest, (long long)p->longest, sum, most, p->work[0][0]);
    }
    usp_sequence_destroy(sequence);
    usp_mesh_destroy(mesh);
    usp_count(rank);
    return failed ? usp_say(rank, "%s", usp_last_error()) : 0;
}

/* Tiles end where chunks do. */
Test(numbers, tensor_work_is_that_of_one_rank) {
    static packed all[] = {
        {.shortest = 256, .longest = 16384}, {.shortest = 64, .longest = 1024}, {.shortest = 32, .longest = 128}};
    const usp_layout layouts[] = {USP_LAYOUT_ZIGZAG, USP_LAYOUT_CONTIGUOUS, USP_LAYOUT_ZIGZAG_PER_DOCUMENT};
    for (int i = 0; i < 9; i++) {
        packed *p = &all[i % 3];
        if (!p->count) draw(p);
        p->layout = layouts[i / 3];
        p->busiest = p->layout == USP_LAYOUT_ZIGZAG_PER_DOCUMENT ? 1.08 : 0;
        usp_expect_ranks(1, SECONDS, measure_work, p);
        usp_expect_ranks(RING, SECONDS, measure_work, p);
    }
}

/* ---- memory ------------------------------------------------------------------------------------------------------ */

/* 4M tokens, 32 heads of 128 over 8 of keys, bf16: what no GPU of 80 GB may exceed. */
static int large_layer(usp_rank *rank, void *argument) {
    const double gib = 1024.0 * 1024.0 * 1024.0;
    usp_case c = {.tokens = 4 << 20,
                  .mask = USP_MASK_CAUSAL,
                  .dtype = USP_BF16,
                  .heads = 32,
                  .kv_heads = 8,
                  .head_dim = 128,
                  .return_lse = 1,
                  .ulysses = 4,
                  .ring = 2};
    usp_stage stage;
    (void)argument;
    if (usp_stage_open(rank, &c, &stage) != USP_OK) return usp_say(rank, "%s", usp_last_error());
    double forward = (double)stage.sizes.forward_workspace / gib,
           backward = (double)stage.sizes.backward_workspace / gib;
    if (forward > 23.5 || backward > 33) usp_say(rank, "%.2f GiB forward, %.2f backward", forward, backward);
    usp_stage_close(&stage);
    usp_count(rank);
    return 0;
}

Test(numbers, memory_of_a_large_layer) {
    usp_expect_ranks(8, SECONDS, large_layer, NULL);
}
