/* test_api.c - what the API promises when it is used wrongly: every field of every struct, ranks that disagree, memory
 * that runs out. Nothing may crash, hang or leak, and the world must be usable afterwards. Results are judged
 * elsewhere. */
#include "expect.h"
#include "stage.h"

#include <math.h>
#include <pthread.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

enum { SECONDS = 120, TOKENS = 32, CANARY = 0x5a };

/* ---- fields of structs, one wrong at a time ---------------------------------------------------------------------- */

typedef enum kind { INT, INT64, SIZE, FLOAT, POINTER } kind;

/* Sets one field of a good struct to a value, and says what should come of it. */
typedef struct wrong {
    const char *name; /* part of the sentence */
    size_t offset;
    kind kind;
    double value; /* POINTER: 0: NULL, else the address `pointer` */
    usp_status status;
    const void *pointer;
} wrong;

static void set_field(void *fields, const wrong *w) {
    void *to = (char *)fields + w->offset;
    if (w->kind == INT) memcpy(to, &(int){(int)w->value}, sizeof(int));
    if (w->kind == INT64) memcpy(to, &(int64_t){(int64_t)w->value}, sizeof(int64_t));
    if (w->kind == SIZE) memcpy(to, &(size_t){(size_t)w->value}, sizeof(size_t));
    if (w->kind == FLOAT) memcpy(to, &(float){(float)w->value}, sizeof(float));
    if (w->kind == POINTER) memcpy(to, &(const void *){w->value != 0 ? w->pointer : NULL}, sizeof(void *));
}

static int says(const char *name) {
    return strstr(usp_last_error(), name) != NULL;
}

/* The one verdict on a call that should fail with w's status and name its field. */
static void judge(usp_rank *rank, const wrong *w, const char *what, usp_status status) {
    if (status == w->status && says(w->name)) return;
    usp_say(rank, "%s with a wrong %s (%g): %s, \"%s\"", what, w->name, w->value, usp_status_string(status),
            usp_last_error());
}

/* A good mesh, sequence and layer to change, and what was allocated before. */
typedef struct bench {
    usp_rank *rank;
    usp_mesh *mesh;
    usp_sequence *sequence;
    int live;
} bench;

static usp_sequence_config good_sequence(void) {
    return (usp_sequence_config){.struct_size = sizeof(usp_sequence_config), .tokens = TOKENS};
}

static usp_layer_config good_softmax(void) {
    return (usp_layer_config){.struct_size = sizeof(usp_layer_config),
                              .attention = USP_SOFTMAX,
                              .mask = USP_MASK_CAUSAL,
                              .batch = 1,
                              .heads = 4,
                              .kv_heads = 4,
                              .head_dim = 8,
                              .value_dim = 8,
                              .scale = 1};
}

static usp_layer_config good_linear(void) {
    usp_layer_config config = good_softmax();
    config.attention = USP_LINEAR;
    config.value_heads = 4;
    return config;
}

static int open_bench(usp_rank *rank, int ulysses, bench *b) {
    usp_sequence_config config = good_sequence();
    *b = (bench){.rank = rank};
    if (usp_mesh_create(rank->world, ulysses, rank->size / ulysses, &b->mesh) != USP_OK ||
        usp_sequence_create(b->mesh, &config, &b->sequence) != USP_OK)
        return usp_say(rank, "%s", usp_last_error());
    b->live = atomic_load(&rank->heap->live);
    return 0;
}

static void close_bench(bench *b) {
    usp_sequence_destroy(b->sequence);
    usp_mesh_destroy(b->mesh);
}

/* After a refusal: nothing is left allocated, and the next good call works. */
static int check_unharmed(bench *b, const char *name) {
    usp_layer_config config = good_softmax();
    usp_layer *layer = NULL;
    int live = atomic_load(&b->rank->heap->live);
    if (live != b->live) usp_say(b->rank, "after a wrong %s %d allocations are left", name, live - b->live);
    b->live = live;
    if (usp_layer_create(b->mesh, b->sequence, &config, &layer) != USP_OK)
        return usp_say(b->rank, "after a wrong %s: %s", name, usp_last_error());
    usp_layer_destroy(layer);
    return 0;
}

static const float bad_decay[4] = {0, 0.5f, 0, 0};
static const int64_t falling_ends[] = {20, 10, TOKENS}, short_ends[] = {10, 20, 30}, long_ends[] = {10, 20, 40};
static const usp_segment outside[] = {{TOKENS - 1, 2, 1}}, negative[] = {{-1, 4, 1}}, no_stride[] = {{0, 4, 0}};
static const usp_segment beyond[] = {{2 * TOKENS - 1, 2, 1}};
static const usp_segment too_few[] = {{0, 4, 1}}, backwards[] = {{8, -5, 1}};

static const wrong softmax_fields[] = {
    {"struct_size", offsetof(usp_layer_config, struct_size), SIZE, 0, USP_INVALID, NULL},
    {"struct_size", offsetof(usp_layer_config, struct_size), SIZE, 4, USP_INVALID, NULL},
    {"attention", offsetof(usp_layer_config, attention), INT, 0, USP_INVALID, NULL},
    {"attention", offsetof(usp_layer_config, attention), INT, 3, USP_INVALID, NULL},
    {"attention", offsetof(usp_layer_config, attention), INT, -1, USP_INVALID, NULL},
    {"mask", offsetof(usp_layer_config, mask), INT, 0, USP_INVALID, NULL}, /* forgotten */
    {"mask", offsetof(usp_layer_config, mask), INT, 3, USP_INVALID, NULL},
    {"mask", offsetof(usp_layer_config, mask), INT, -1, USP_INVALID, NULL},
    {"dtype", offsetof(usp_layer_config, dtype), INT, 3, USP_INVALID, NULL},
    {"dtype", offsetof(usp_layer_config, dtype), INT, -1, USP_INVALID, NULL},
    {"batch", offsetof(usp_layer_config, batch), INT, 0, USP_INVALID, NULL},
    {"batch", offsetof(usp_layer_config, batch), INT, -3, USP_INVALID, NULL},
    {"batch", offsetof(usp_layer_config, batch), INT, 65537, USP_INVALID, NULL},
    {"heads", offsetof(usp_layer_config, heads), INT, 65540, USP_INVALID, NULL},
    {"heads", offsetof(usp_layer_config, heads), INT, 0, USP_INVALID, NULL},
    {"heads", offsetof(usp_layer_config, heads), INT, -4, USP_INVALID, NULL},
    {"heads", offsetof(usp_layer_config, heads), INT, 6, USP_INVALID, NULL},
    {"kv_heads", offsetof(usp_layer_config, kv_heads), INT, 3, USP_INVALID, NULL},
    {"kv_heads", offsetof(usp_layer_config, kv_heads), INT, 8, USP_INVALID, NULL},
    {"kv_heads", offsetof(usp_layer_config, kv_heads), INT, -1, USP_INVALID, NULL},
    {"value_heads", offsetof(usp_layer_config, value_heads), INT, 2, USP_INVALID, NULL},
    {"value_heads", offsetof(usp_layer_config, value_heads), INT, -1, USP_INVALID, NULL},
    {"head_dim", offsetof(usp_layer_config, head_dim), INT, 0, USP_INVALID, NULL},
    {"head_dim", offsetof(usp_layer_config, head_dim), INT, -8, USP_INVALID, NULL},
    {"head_dim", offsetof(usp_layer_config, head_dim), INT, 65537, USP_INVALID, NULL},
    {"head_dim", offsetof(usp_layer_config, head_dim), INT, 513, USP_UNSUPPORTED, NULL},
    {"value_dim", offsetof(usp_layer_config, value_dim), INT, 513, USP_UNSUPPORTED, NULL},
    {"value_dim", offsetof(usp_layer_config, value_dim), INT, -8, USP_INVALID, NULL},
    {"scale", offsetof(usp_layer_config, scale), FLOAT, NAN, USP_INVALID, NULL},
    {"scale", offsetof(usp_layer_config, scale), FLOAT, INFINITY, USP_INVALID, NULL},
    {"return_lse", offsetof(usp_layer_config, return_lse), INT, 2, USP_INVALID, NULL},
    {"deterministic", offsetof(usp_layer_config, deterministic), INT, -1, USP_INVALID, NULL},
    {"state_exchange", offsetof(usp_layer_config, state_exchange), INT, 3, USP_INVALID, NULL},
    {"state_exchange", offsetof(usp_layer_config, state_exchange), INT, -1, USP_INVALID, NULL},
    {"state_exchange", offsetof(usp_layer_config, state_exchange), INT, USP_STATE_CHAIN, USP_INVALID, NULL},
    {"recompute_state", offsetof(usp_layer_config, recompute_state), INT, 1, USP_INVALID, NULL},
    {"initial_state", offsetof(usp_layer_config, initial_state), INT, 1, USP_INVALID, NULL},
    {"final_state", offsetof(usp_layer_config, final_state), INT, 1, USP_INVALID, NULL},
    {"decay", offsetof(usp_layer_config, decay), POINTER, 1, USP_INVALID, bad_decay},
};

static const wrong linear_fields[] = {
    {"heads", offsetof(usp_layer_config, heads), INT, 3, USP_INVALID, NULL},
    {"kv_heads", offsetof(usp_layer_config, kv_heads), INT, 3, USP_INVALID, NULL},
    {"value_heads", offsetof(usp_layer_config, value_heads), INT, 3, USP_INVALID, NULL},
    {"return_lse", offsetof(usp_layer_config, return_lse), INT, 1, USP_INVALID, NULL},
    {"recompute_state", offsetof(usp_layer_config, recompute_state), INT, 2, USP_INVALID, NULL},
    {"initial_state", offsetof(usp_layer_config, initial_state), INT, 2, USP_INVALID, NULL},
    {"final_state", offsetof(usp_layer_config, final_state), INT, -1, USP_INVALID, NULL},
    {"decay", offsetof(usp_layer_config, decay), POINTER, 1, USP_INVALID, bad_decay},
};

/* Of a bidirectional layer. */
static const float good_decay[4] = {0, -1, 0, 0};
static const wrong bidirectional_fields[] = {
    {"decay", offsetof(usp_layer_config, decay), POINTER, 1, USP_UNSUPPORTED, good_decay},
    {"initial_state", offsetof(usp_layer_config, initial_state), INT, 1, USP_UNSUPPORTED, NULL},
};

static const wrong sequence_fields[] = {
    {"struct_size", offsetof(usp_sequence_config, struct_size), SIZE, 1, USP_INVALID, NULL},
    {"struct_size", offsetof(usp_sequence_config, struct_size), SIZE, 41, USP_INVALID, NULL}, /* cuts document_ends */
    {"layout", offsetof(usp_sequence_config, layout), INT, 5, USP_INVALID, NULL},
    {"layout", offsetof(usp_sequence_config, layout), INT, -1, USP_INVALID, NULL},
    {"max_documents", offsetof(usp_sequence_config, max_documents), INT, -1, USP_INVALID, NULL},
    {"tokens", offsetof(usp_sequence_config, tokens), INT64, 0, USP_INVALID, NULL}, /* forgotten */
    {"tokens", offsetof(usp_sequence_config, tokens), INT64, -2, USP_INVALID, NULL},
    {"tokens", offsetof(usp_sequence_config, tokens), INT64, 2147483648.0, USP_INVALID, NULL},
    {"tokens", offsetof(usp_sequence_config, tokens), INT64, 1e18, USP_INVALID, NULL},
    {"key_tokens", offsetof(usp_sequence_config, key_tokens), INT64, -7, USP_INVALID, NULL},
    {"key_tokens", offsetof(usp_sequence_config, key_tokens), INT64, 2147483648.0, USP_INVALID, NULL},
    {"documents", offsetof(usp_sequence_config, documents), INT64, -1, USP_INVALID, NULL},
    {"documents", offsetof(usp_sequence_config, documents), INT64, 2, USP_INVALID, NULL},
    {"documents is not set", offsetof(usp_sequence_config, layout), INT, USP_LAYOUT_ZIGZAG_PER_DOCUMENT, USP_INVALID,
     NULL},
    {"segments", offsetof(usp_sequence_config, segments), INT64, 1, USP_INVALID, NULL},
    {"segments", offsetof(usp_sequence_config, segments), INT64, -1, USP_INVALID, NULL},
};

/* Of a sequence with three documents. */
static const wrong document_fields[] = {
    {"documents", offsetof(usp_sequence_config, documents), INT64, 2147483648.0, USP_INVALID, NULL},
    {"documents", offsetof(usp_sequence_config, documents), INT64, 9e18, USP_INVALID, NULL},
    {"document_ends", offsetof(usp_sequence_config, document_ends), POINTER, 0, USP_INVALID, NULL},
    {"document_ends", offsetof(usp_sequence_config, document_ends), POINTER, 1, USP_INVALID, falling_ends},
    {"document_ends", offsetof(usp_sequence_config, document_ends), POINTER, 1, USP_INVALID, short_ends},
    {"document_ends", offsetof(usp_sequence_config, document_ends), POINTER, 1, USP_INVALID, long_ends},
    {"documents", offsetof(usp_sequence_config, documents), INT64, -1, USP_INVALID, NULL},
    {"max_documents", offsetof(usp_sequence_config, max_documents), INT, -1, USP_INVALID, NULL},
    {"key_document_ends", offsetof(usp_sequence_config, key_tokens), INT64, 64, USP_INVALID, NULL},
};

/* Of a custom sequence with one segment a rank. */
static const wrong segment_fields[] = {
    {"segment", offsetof(usp_sequence_config, segment), POINTER, 0, USP_INVALID, NULL},
    {"segment", offsetof(usp_sequence_config, segment), POINTER, 1, USP_INVALID, outside},
    {"segment", offsetof(usp_sequence_config, segment), POINTER, 1, USP_INVALID, negative},
    {"segment", offsetof(usp_sequence_config, segment), POINTER, 1, USP_INVALID, no_stride},
    {"segment", offsetof(usp_sequence_config, segment), POINTER, 1, USP_INVALID, backwards},
    {"segment", offsetof(usp_sequence_config, segment), POINTER, 1, USP_INVALID, too_few},
    {"segment", offsetof(usp_sequence_config, segments), INT64, 0, USP_INVALID, NULL},
    {"segments", offsetof(usp_sequence_config, segments), INT64, -1, USP_INVALID, NULL},
    {"key_segment", offsetof(usp_sequence_config, key_tokens), INT64, 64, USP_INVALID, NULL},
    {"key_segment", offsetof(usp_sequence_config, key_segment), POINTER, 1, USP_INVALID, outside},
    {"key_segments", offsetof(usp_sequence_config, key_segments), INT64, 1, USP_INVALID, NULL},
};

/* Of a custom sequence with one segment a rank of the queries and one of 2 x TOKENS keys. */
static const wrong key_segment_fields[] = {
    {"key_segment", offsetof(usp_sequence_config, key_segment), POINTER, 0, USP_INVALID, NULL},
    {"key_segment", offsetof(usp_sequence_config, key_segment), POINTER, 1, USP_INVALID, negative},
    {"key_segment", offsetof(usp_sequence_config, key_segment), POINTER, 1, USP_INVALID, no_stride},
    {"key_segment", offsetof(usp_sequence_config, key_segment), POINTER, 1, USP_INVALID, beyond},
    {"key_segment", offsetof(usp_sequence_config, key_segment), POINTER, 1, USP_INVALID, outside}, /* owned twice */
    {"key_segments", offsetof(usp_sequence_config, key_segments), INT64, -1, USP_INVALID, NULL},
    {"key_segment", offsetof(usp_sequence_config, key_segments), INT64, 0, USP_INVALID, NULL},
    {"key_segment", offsetof(usp_sequence_config, key_tokens), INT64, 0, USP_INVALID, NULL},
    {"segment", offsetof(usp_sequence_config, layout), INT, USP_LAYOUT_ZIGZAG, USP_INVALID, NULL},
};

static int try_layers(bench *b, usp_layer_config good, const wrong *fields, int count) {
    for (int i = 0; i < count; i++) {
        usp_layer_config config = good;
        usp_layer *layer = NULL;
        set_field(&config, &fields[i]);
        judge(b->rank, &fields[i], "layer", usp_layer_create(b->mesh, b->sequence, &config, &layer));
        if (layer) return usp_say(b->rank, "a layer came of a wrong %s", fields[i].name);
        if (check_unharmed(b, fields[i].name)) return 1;
    }
    return 0;
}

static int try_sequences(bench *b, usp_sequence_config good, const wrong *fields, int count) {
    for (int i = 0; i < count; i++) {
        usp_sequence_config config = good;
        usp_sequence *sequence = NULL;
        set_field(&config, &fields[i]);
        judge(b->rank, &fields[i], "sequence", usp_sequence_create(b->mesh, &config, &sequence));
        if (sequence) return usp_say(b->rank, "a sequence came of a wrong %s", fields[i].name);
        if (check_unharmed(b, fields[i].name)) return 1;
    }
    return 0;
}

/* Every rank brings every token, in segments of which no two can be joined: more than a sequence has room for. */
static int try_overlap(bench *b) {
    static const wrong twice = {"owned twice", 0, POINTER, 0, USP_INVALID, NULL};
    usp_segment all[TOKENS];
    usp_sequence *sequence = NULL;
    usp_sequence_config config = good_sequence();
    for (int i = 0; i < TOKENS; i++) all[i] = (usp_segment){i * 2 % TOKENS + i * 2 / TOKENS, 1, 1};
    config.layout = USP_LAYOUT_CUSTOM;
    config.segments = TOKENS;
    config.segment = all;
    judge(b->rank, &twice, "sequence", usp_sequence_create(b->mesh, &config, &sequence));
    return sequence || check_unharmed(b, "overlap");
}

static int wrong_fields(usp_rank *rank, void *argument) {
    static const int64_t ends[] = {10, 20, TOKENS};
    bench b;
    usp_layer_config bidirectional = good_linear();
    usp_sequence_config documents = good_sequence(), custom = good_sequence();
    int64_t share = TOKENS / rank->size;
    const usp_segment own = {rank->rank * share, rank->rank == rank->size - 1 ? TOKENS - rank->rank * share : share, 1};
    const usp_segment keys = {2 * own.start, 2 * own.length, 1};
    (void)argument;
    bidirectional.mask = USP_MASK_FULL;
    documents.layout = USP_LAYOUT_ZIGZAG_PER_DOCUMENT;
    documents.documents = 3;
    documents.document_ends = ends;
    custom.layout = USP_LAYOUT_CUSTOM;
    custom.segments = 1;
    custom.segment = &own;
    usp_sequence_config cross = custom;
    cross.key_tokens = 2 * TOKENS;
    cross.key_segments = 1;
    cross.key_segment = &keys;
    int failed =
        open_bench(rank, 1, &b) ||
        try_layers(&b, good_softmax(), softmax_fields, (int)(sizeof softmax_fields / sizeof softmax_fields[0])) ||
        try_layers(&b, good_linear(), linear_fields, (int)(sizeof linear_fields / sizeof linear_fields[0])) ||
        try_layers(&b, bidirectional, bidirectional_fields,
                   (int)(sizeof bidirectional_fields / sizeof bidirectional_fields[0])) ||
        try_sequences(&b, good_sequence(), sequence_fields,
                      (int)(sizeof sequence_fields / sizeof sequence_fields[0])) ||
        try_sequences(&b, cross, key_segment_fields, (int)(sizeof key_segment_fields / sizeof key_segment_fields[0])) ||
        try_sequences(&b, documents, document_fields, (int)(sizeof document_fields / sizeof document_fields[0])) ||
        try_sequences(&b, custom, segment_fields, (int)(sizeof segment_fields / sizeof segment_fields[0])) ||
        (rank->size > 1 && try_overlap(&b));
    if (failed) return 1;
    close_bench(&b);
    usp_count(rank);
    return 0;
}

/* ---- meshes and worlds ------------------------------------------------------------------------------------------- */

static int wrong_meshes(usp_rank *rank, void *argument) {
    static const struct {
        int ulysses, ring;
        const char *name;
    } shapes[] = {{0, 1, "ulysses"},      {1, 0, "ring"}, {-1, 1, "ulysses"}, {1, -2, "ring"},
                  {3, 1, "ulysses"},      {1, 3, "ring"}, {4, 2, "ulysses"},  {65536, 65536, "ulysses"},
                  {1 << 30, 8, "ulysses"}};
    (void)argument;
    for (int i = 0; i < (int)(sizeof shapes / sizeof shapes[0]); i++) {
        usp_mesh *mesh = NULL;
        int live = atomic_load(&rank->heap->live);
        usp_status status = usp_mesh_create(rank->world, shapes[i].ulysses, shapes[i].ring, &mesh);
        if (status != USP_INVALID || mesh || !says(shapes[i].name) || atomic_load(&rank->heap->live) != live)
            usp_say(rank, "mesh %d x %d: %s, \"%s\"", shapes[i].ulysses, shapes[i].ring, usp_status_string(status),
                    usp_last_error());
    }
    usp_count(rank);
    return 0;
}

static const wrong world_fields[] = {
    {"struct_size", offsetof(usp_world_config, struct_size), SIZE, 0, USP_INVALID, NULL},
    {"struct_size", offsetof(usp_world_config, struct_size), SIZE, 7, USP_INVALID, NULL},
    {"device", offsetof(usp_world_config, device), INT, 3, USP_INVALID, NULL},
    {"device", offsetof(usp_world_config, device), INT, -1, USP_INVALID, NULL},
    {"timeout_ms", offsetof(usp_world_config, timeout_ms), INT, -2, USP_INVALID, NULL},
    {"watchdog", offsetof(usp_world_config, watchdog), INT, 2, USP_INVALID, NULL},
    {"silence_ms", offsetof(usp_world_config, silence_ms), INT, -2, USP_INVALID, NULL},
    {"transport", offsetof(usp_world_config, transport), INT, 3, USP_INVALID, NULL},
    {"transport", offsetof(usp_world_config, transport), INT, -1, USP_INVALID, NULL},
    {"node", offsetof(usp_world_config, node), INT, -1, USP_INVALID, NULL},
    {"host_alloc", offsetof(usp_world_config, host_alloc), POINTER, 0, USP_INVALID, NULL},
    {"host_free", offsetof(usp_world_config, host_free), POINTER, 0, USP_INVALID, NULL},
};

static int gather_alone(void *user, const void *mine, void *all, size_t bytes) {
    (void)user;
    memcpy(all, mine, bytes);
    return 0;
}

static usp_status create_alone(int way, const usp_world_config *config, usp_world **world) {
    usp_rendezvous *rendezvous = NULL;
    if (way == 0) return usp_world_create_env(config, world); /* no launcher: a world of one */
    if (way == 1) return usp_world_create_callback(config, gather_alone, NULL, 1, 0, world);
    if (usp_rendezvous_create(1, &rendezvous) != USP_OK) return USP_INTERNAL;
    usp_status status = usp_world_create_threads(config, rendezvous, 0, world);
    usp_rendezvous_destroy(rendezvous);
    return status;
}

Test(api, wrong_worlds) {
    for (int i = 0; i < 3 * (int)(sizeof world_fields / sizeof world_fields[0]); i++) {
        const wrong *w = &world_fields[i / 3];
        usp_heap heap = {0};
        usp_world *world = NULL;
        usp_world_config config = {.struct_size = sizeof config, .device = USP_DEVICE_CPU};
        usp_heap_configure(&heap, &config);
        set_field(&config, w);
        usp_status status = create_alone(i % 3, &config, &world);
        cr_expect(status == w->status && !world && says(w->name), "%s = %g: %s, \"%s\"", w->name, w->value,
                  usp_status_string(status), usp_last_error());
        cr_expect(atomic_load(&heap.live) == 0);
    }
}

/* Of a world on the CPU: threads have no choice, the others no GPU. */
Test(api, transports_between_gpus_alone) {
    for (int way = 0; way < 3; way++) {
        for (int choice = USP_TRANSPORT_NCCL; choice <= USP_TRANSPORT_PEER; choice++) {
            usp_heap heap = {0};
            usp_world *world = NULL;
            usp_world_config config = {
                .struct_size = sizeof config, .device = USP_DEVICE_CPU, .transport = (usp_transport_kind)choice};
            usp_heap_configure(&heap, &config);
            usp_status status = create_alone(way, &config, &world);
            cr_expect(status == (way == 2 ? USP_INVALID : USP_UNSUPPORTED) && !world,
                      "way %d, transport %d: %s, \"%s\"", way, choice, usp_status_string(status), usp_last_error());
            cr_expect(atomic_load(&heap.live) == 0);
        }
    }
}

Test(api, wrong_fields) {
    for (int size = 1; size <= 4; size++) usp_expect_ranks(size, SECONDS, wrong_fields, NULL);
}

Test(api, wrong_meshes) {
    usp_expect_ranks(1, SECONDS, wrong_meshes, NULL);
    usp_expect_ranks(4, SECONDS, wrong_meshes, NULL);
}

/* ---- one rank alone is wrong ------------------------------------------------------------------------------------- */

/* The last rank's call is wrong in itself, the others' are good: they learn that it failed. */
static int one_is_wrong(usp_rank *rank, void *argument) {
    bench b;
    int odd = rank->rank == rank->size - 1;
    (void)argument;
    if (open_bench(rank, 1, &b)) return 1;
    for (int i = 0; i < (int)(sizeof softmax_fields / sizeof softmax_fields[0]); i++) {
        usp_layer_config config = good_softmax();
        usp_layer *layer = NULL;
        if (odd) set_field(&config, &softmax_fields[i]);
        usp_status status = usp_layer_create(b.mesh, b.sequence, &config, &layer);
        int named = !odd || says(softmax_fields[i].name);
        if (status != (odd ? softmax_fields[i].status : USP_PEER_FAILED) || !named || layer)
            usp_say(rank, "one rank with a wrong %s: %s, \"%s\"", softmax_fields[i].name, usp_status_string(status),
                    usp_last_error());
        if (check_unharmed(&b, softmax_fields[i].name)) return 1;
    }
    close_bench(&b);
    usp_count(rank);
    return 0;
}

Test(api, one_rank_is_wrong) {
    usp_expect_ranks(3, SECONDS, one_is_wrong, NULL);
}

/* ---- ranks that disagree ----------------------------------------------------------------------------------------- */

/* Other good values than those of good_linear, softmax and sequence. */
static const wrong other_linear[] = {
    {"attention", offsetof(usp_layer_config, attention), INT, USP_SOFTMAX, USP_MISMATCH, NULL},
    {"mask", offsetof(usp_layer_config, mask), INT, USP_MASK_FULL, USP_MISMATCH, NULL},
    {"dtype", offsetof(usp_layer_config, dtype), INT, USP_BF16, USP_MISMATCH, NULL},
    {"batch", offsetof(usp_layer_config, batch), INT, 2, USP_MISMATCH, NULL},
    {"heads", offsetof(usp_layer_config, heads), INT, 8, USP_MISMATCH, NULL},
    {"kv_heads", offsetof(usp_layer_config, kv_heads), INT, 2, USP_MISMATCH, NULL},
    {"value_heads", offsetof(usp_layer_config, value_heads), INT, 2, USP_MISMATCH, NULL},
    {"head_dim", offsetof(usp_layer_config, head_dim), INT, 16, USP_MISMATCH, NULL},
    {"value_dim", offsetof(usp_layer_config, value_dim), INT, 16, USP_MISMATCH, NULL},
    {"scale", offsetof(usp_layer_config, scale), FLOAT, 0.5, USP_MISMATCH, NULL},
    {"deterministic", offsetof(usp_layer_config, deterministic), INT, 1, USP_MISMATCH, NULL},
    {"state_exchange", offsetof(usp_layer_config, state_exchange), INT, USP_STATE_CHAIN, USP_MISMATCH, NULL},
    {"recompute_state", offsetof(usp_layer_config, recompute_state), INT, 1, USP_MISMATCH, NULL},
    {"initial_state", offsetof(usp_layer_config, initial_state), INT, 1, USP_MISMATCH, NULL},
    {"final_state", offsetof(usp_layer_config, final_state), INT, 1, USP_MISMATCH, NULL},
    {"decay", offsetof(usp_layer_config, decay), POINTER, 1, USP_MISMATCH, good_decay},
};
static const wrong other_softmax[] = {
    {"return_lse", offsetof(usp_layer_config, return_lse), INT, 1, USP_MISMATCH, NULL},
    {"kv_heads", offsetof(usp_layer_config, kv_heads), INT, 1, USP_MISMATCH, NULL},
};
static const int64_t other_ends[] = {10, 21, TOKENS};
static const wrong other_sequence[] = {
    {"layout", offsetof(usp_sequence_config, layout), INT, USP_LAYOUT_STRIPE, USP_MISMATCH, NULL},
    {"tokens", offsetof(usp_sequence_config, tokens), INT64, TOKENS + 1, USP_MISMATCH, NULL},
    {"key_tokens", offsetof(usp_sequence_config, key_tokens), INT64, 5, USP_MISMATCH, NULL},
};
static const wrong other_documents[] = {
    {"max_documents", offsetof(usp_sequence_config, max_documents), INT, 9, USP_MISMATCH, NULL},
    {"documents", offsetof(usp_sequence_config, documents), INT64, 4, USP_MISMATCH, NULL},
    {"document_ends", offsetof(usp_sequence_config, document_ends), POINTER, 1, USP_MISMATCH, other_ends},
};

static int disagree_on_layers(bench *b, usp_layer_config good, const wrong *fields, int count, int odd) {
    for (int i = 0; i < count; i++) {
        usp_layer_config config = good;
        usp_layer *layer = NULL;
        if (b->rank->rank == odd) set_field(&config, &fields[i]);
        judge(b->rank, &fields[i], "disagreement", usp_layer_create(b->mesh, b->sequence, &config, &layer));
        if (layer || check_unharmed(b, fields[i].name)) return 1;
    }
    return 0;
}

static int disagree_on_sequences(bench *b, usp_sequence_config good, const wrong *fields, int count, int odd) {
    for (int i = 0; i < count; i++) {
        usp_sequence_config config = good;
        usp_sequence *sequence = NULL;
        if (b->rank->rank == odd) set_field(&config, &fields[i]);
        judge(b->rank, &fields[i], "disagreement", usp_sequence_create(b->mesh, &config, &sequence));
        if (sequence || check_unharmed(b, fields[i].name)) return 1;
    }
    return 0;
}

static int disagree_on_meshes(bench *b, int odd) {
    static const wrong ulysses = {"ulysses", 0, INT, 0, USP_MISMATCH, NULL},
                       ring = {"ring", 0, INT, 0, USP_MISMATCH, NULL};
    usp_mesh *mesh = NULL;
    int me = b->rank->rank == odd, size = b->rank->size;
    judge(b->rank, &ulysses, "mesh", usp_mesh_create(b->rank->world, me ? size : 1, 1, &mesh));
    judge(b->rank, &ring, "mesh", usp_mesh_create(b->rank->world, 1, me ? size : 1, &mesh));
    return mesh != NULL || check_unharmed(b, "mesh");
}

/* Different calls, and different sequences or meshes for one layer. */
static int disagree_on_objects(bench *b, int odd) {
    static const wrong call = {"mesh", 0, INT, 0, USP_MISMATCH, NULL};
    static const wrong what = {"sequence", 0, INT, 0, USP_MISMATCH, NULL};
    usp_sequence_config longer = good_sequence();
    usp_layer_config config = good_softmax();
    usp_sequence *other = NULL;
    usp_mesh *mesh = NULL;
    usp_layer *layer = NULL;
    int me = b->rank->rank == odd;
    usp_status status =
        me ? usp_mesh_create(b->rank->world, 1, 1, &mesh) : usp_layer_create(b->mesh, b->sequence, &config, &layer);
    judge(b->rank, &call, "another call", status);
    longer.tokens += 8;
    if (usp_sequence_create(b->mesh, &longer, &other) != USP_OK) return usp_say(b->rank, "%s", usp_last_error());
    judge(b->rank, &what, "layer", usp_layer_create(b->mesh, me ? other : b->sequence, &config, &layer));
    usp_sequence_destroy(other);
    longer.tokens -= 8;
    longer.layout = USP_LAYOUT_CONTIGUOUS;
    if (usp_sequence_create(b->mesh, &longer, &other) != USP_OK) return usp_say(b->rank, "%s", usp_last_error());
    judge(b->rank, &what, "layer", usp_layer_create(b->mesh, me ? other : b->sequence, &config, &layer));
    usp_sequence_destroy(other);
    return mesh || layer || check_unharmed(b, "object");
}

/* Sequences that have the same tokens now, but one of them room for more keys; or other owners of keys alone. */
static int disagree_on_keys(bench *b, int odd) {
    static const wrong what = {"sequence", 0, INT, 0, USP_MISMATCH, NULL};
    static const int64_t ends[] = {TOKENS}, key_ends[] = {TOKENS - 3};
    int me = b->rank->rank == odd, rank = b->rank->rank, last = b->rank->size - 1;
    const usp_documents fewer = {sizeof fewer, 1, ends, key_ends, NULL, NULL};
    const usp_segment own = {rank * TOKENS / (last + 1), TOKENS / (last + 1), 1};
    const usp_segment keys = {2 * own.start, 2 * own.length, 1},
                      mirrored = {(last - rank) * keys.length, keys.length, 1};
    usp_layer_config config = good_softmax();
    usp_layer *layer = NULL;
    for (int custom = 0; custom < 2; custom++) {
        usp_sequence *of[2] = {NULL, NULL};
        for (int i = 0; i < 2; i++) {
            usp_sequence_config c = good_sequence();
            c.layout = custom ? USP_LAYOUT_CUSTOM : USP_LAYOUT_ZIGZAG_PER_DOCUMENT;
            c.key_tokens = custom ? 2 * TOKENS : (2 + i) * TOKENS;
            c.max_documents = custom ? 0 : 4;
            c.segments = c.key_segments = custom;
            c.segment = custom ? &own : NULL;
            c.key_segment = custom ? (i ? &mirrored : &keys) : NULL;
            if (usp_sequence_create(b->mesh, &c, &of[i]) != USP_OK ||
                (!custom && usp_sequence_replan_documents(of[i], &fewer, NULL) != USP_OK))
                return usp_say(b->rank, "%s", usp_last_error());
        }
        judge(b->rank, &what, "layer", usp_layer_create(b->mesh, of[me], &config, &layer));
        usp_sequence_destroy(of[0]);
        usp_sequence_destroy(of[1]);
    }
    return layer || check_unharmed(b, "keys");
}

/* Data copies may hold other tokens, but must be the same copies for all ranks and take the same steps. */
static int disagree_between_copies(bench *b) {
    static const wrong copies = {"mesh", 0, INT, 0, USP_MISMATCH, NULL};
    static const wrong steps = {"layout", 0, INT, 0, USP_MISMATCH, NULL};
    static const usp_segment all = {0, TOKENS, 1}, all_keys = {0, 2 * TOKENS, 1};
    usp_sequence_config config = good_sequence(), custom = good_sequence();
    usp_mesh *alone = NULL;
    usp_sequence *sequence = NULL;
    int second = b->rank->rank >= b->rank->size / 2;
    custom.layout = USP_LAYOUT_CUSTOM;
    custom.segments = 1;
    custom.segment = &all;
    usp_sequence_config cross = custom;
    cross.key_tokens = 2 * TOKENS;
    cross.key_segments = 1;
    cross.key_segment = &all_keys;
    if (usp_mesh_create(b->rank->world, 1, 1, &alone) != USP_OK) return usp_say(b->rank, "%s", usp_last_error());
    judge(b->rank, &copies, "copies", usp_sequence_create(second ? alone : b->mesh, &config, &sequence));
    judge(b->rank, &steps, "copies", usp_sequence_create(alone, second ? &custom : &config, &sequence));
    judge(b->rank, &steps, "copies", usp_sequence_create(alone, second ? &custom : &cross, &sequence));
    usp_mesh_destroy(alone);
    return sequence || check_unharmed(b, "copies");
}

static int disagree_on_gathers(bench *b, int odd) {
    static const wrong batch = {"batch", 0, INT, 0, USP_MISMATCH, NULL},
                       bytes = {"token_bytes", 0, INT, 0, USP_MISMATCH, NULL};
    char local[4 * TOKENS] = {0}, whole[4 * TOKENS];
    int me = b->rank->rank == odd;
    judge(b->rank, &batch, "gather", usp_sequence_gather(b->sequence, me ? 2 : 1, 2, local, whole));
    judge(b->rank, &bytes, "gather", usp_sequence_gather(b->sequence, 1, me ? 2 : 1, local, whole));
    return check_unharmed(b, "gather");
}

static int disagree(usp_rank *rank, void *argument) {
    static const int64_t ends[] = {10, 20, TOKENS, TOKENS}; /* the fourth document is empty */
    bench b;
    usp_sequence_config documents = good_sequence();
    documents.layout = USP_LAYOUT_ZIGZAG_PER_DOCUMENT;
    documents.documents = 3;
    documents.max_documents = 8;
    documents.document_ends = ends;
    (void)argument;
    if (open_bench(rank, 1, &b)) return 1;
    for (int odd = 0; odd < rank->size; odd += rank->size - 1) {
        int failed = disagree_on_layers(&b, good_linear(), other_linear,
                                        (int)(sizeof other_linear / sizeof other_linear[0]), odd) ||
                     disagree_on_layers(&b, good_softmax(), other_softmax,
                                        (int)(sizeof other_softmax / sizeof other_softmax[0]), odd) ||
                     disagree_on_sequences(&b, good_sequence(), other_sequence,
                                           (int)(sizeof other_sequence / sizeof other_sequence[0]), odd) ||
                     disagree_on_sequences(&b, documents, other_documents,
                                           (int)(sizeof other_documents / sizeof other_documents[0]), odd) ||
                     disagree_on_meshes(&b, odd) || disagree_on_objects(&b, odd) || disagree_on_keys(&b, odd) ||
                     disagree_between_copies(&b) || disagree_on_gathers(&b, odd);
        if (failed) return usp_say(rank, "cannot go on");
    }
    close_bench(&b);
    usp_count(rank);
    return 0;
}

Test(api, ranks_disagree) {
    usp_expect_ranks(2, SECONDS, disagree, NULL);
    usp_expect_ranks(4, SECONDS, disagree, NULL);
}

/* ---- worlds of threads, made by hand ----------------------------------------------------------------------------- */

typedef struct maker {
    usp_rendezvous *rendezvous;
    usp_world_config config;
    usp_heap heap;
    int rank;
    int nowhere; /* gives no place for the world */
    usp_status status;
    char sentence[256];
} maker;

static void *make_world(void *argument) {
    maker *m = argument;
    usp_world *world = NULL;
    usp_heap_configure(&m->heap, &m->config);
    m->status = usp_world_create_threads(&m->config, m->rendezvous, m->rank, m->nowhere ? NULL : &world);
    strncpy(m->sentence, usp_last_error(), sizeof m->sentence - 1);
    usp_world_destroy(world);
    return NULL;
}

/* Makes a world of two ranks by their configs; sets their statuses. */
static void make_pair(maker *makers) {
    pthread_t threads[2];
    usp_rendezvous *rendezvous = NULL;
    cr_assert(usp_rendezvous_create(2, &rendezvous) == USP_OK);
    for (int i = 0; i < 2; i++) {
        makers[i].rendezvous = rendezvous;
        makers[i].rank = i;
        makers[i].config.struct_size = sizeof makers[i].config;
        makers[i].config.device = USP_DEVICE_CPU;
        if (makers[i].config.timeout_ms == 0) makers[i].config.timeout_ms = 20000;
        cr_assert(pthread_create(&threads[i], NULL, make_world, &makers[i]) == 0);
    }
    for (int i = 0; i < 2; i++) pthread_join(threads[i], NULL);
    for (int i = 0; i < 2; i++) cr_expect(atomic_load(&makers[i].heap.live) == 0, "rank %d leaves memory behind", i);
    usp_rendezvous_destroy(rendezvous);
}

Test(api, worlds_disagree, .timeout = 60) {
    maker *makers = calloc(2, sizeof *makers);
    makers[0].config.timeout_ms = 10000;
    makers[1].config.timeout_ms = 9000;
    make_pair(makers);
    for (int i = 0; i < 2; i++)
        cr_expect(makers[i].status == USP_MISMATCH && strstr(makers[i].sentence, "timeout_ms"), "rank %d: %s, \"%s\"",
                  i, usp_status_string(makers[i].status), makers[i].sentence);
    free(makers);
}

/* The others must not wait for a rank that cannot come. */
Test(api, no_place_for_a_world, .timeout = 60) {
    maker *makers = calloc(2, sizeof *makers);
    makers[1].nowhere = 1;
    make_pair(makers);
    cr_expect(makers[0].status == USP_PEER_FAILED && strstr(makers[0].sentence, "rank 1"), "rank 0: %s, \"%s\"",
              usp_status_string(makers[0].status), makers[0].sentence);
    cr_expect(makers[1].status == USP_INVALID && strstr(makers[1].sentence, "world"), "rank 1: %s, \"%s\"",
              usp_status_string(makers[1].status), makers[1].sentence);
    free(makers);
}

/* ---- memory that runs out ---------------------------------------------------------------------------------------- */

Test(api, no_memory_for_a_world, .timeout = 120) {
    int k = 1;
    for (int refused = 1; refused; k++) {
        maker *makers = calloc(2, sizeof *makers);
        usp_heap_arm(&makers[1].heap, k);
        make_pair(makers);
        refused = usp_heap_disarm(&makers[1].heap);
        usp_status mine = refused ? USP_NO_MEMORY : USP_OK, other = refused ? USP_PEER_FAILED : USP_OK;
        cr_expect(makers[1].status == mine && makers[0].status == other, "allocation %d: \"%s\" and \"%s\"", k,
                  makers[1].sentence, makers[0].sentence);
        free(makers);
        cr_assert(k < 1000);
    }
    cr_expect(k > 3, "only %d allocations were tried", k);
}

typedef enum thing {
    MESH,
    SEQUENCE,
    CROSS_SEQUENCE,
    DOCUMENT_SEQUENCE,
    TREE_SEQUENCE,
    PACKED_CROSS_SEQUENCE,
    CUSTOM_SEQUENCE,
    SOFTMAX_LAYER,
    LINEAR_LAYER,
    GATHER,
    SHARED_MEMORY,
    OBJECTS
} thing;

static usp_status make_sequence(bench *b, thing what, usp_sequence **sequence) {
    static const int64_t ends[] = {TOKENS / 3, TOKENS}, key_ends[] = {TOKENS, TOKENS + 5}, parents[] = {-1, 0};
    usp_sequence_config config = good_sequence();
    int64_t share = TOKENS / b->rank->size;
    const usp_segment own = {b->rank->rank * share, share, 1}, keys = {2 * own.start, 2 * share, 1};
    if (what == CROSS_SEQUENCE || what == PACKED_CROSS_SEQUENCE) config.key_tokens = TOKENS + 5;
    if (what == DOCUMENT_SEQUENCE) config.layout = USP_LAYOUT_ZIGZAG_PER_DOCUMENT;
    if (what >= DOCUMENT_SEQUENCE && what <= PACKED_CROSS_SEQUENCE) {
        config.documents = 2;
        config.max_documents = 8;
        config.document_ends = ends;
    }
    if (what == TREE_SEQUENCE) config.parents = parents;
    if (what == PACKED_CROSS_SEQUENCE) config.key_document_ends = key_ends;
    if (what == CUSTOM_SEQUENCE) {
        config.layout = USP_LAYOUT_CUSTOM;
        config.segments = 1;
        config.segment = &own;
        config.key_tokens = 2 * TOKENS;
        config.key_segments = 1;
        config.key_segment = &keys;
    }
    return usp_sequence_create(b->mesh, &config, sequence);
}

static usp_status make_shared(bench *b) {
    void *memory = NULL;
    usp_status status = usp_world_alloc_shared(b->rank->world, 1000, &memory);
    return status == USP_OK ? usp_world_free_shared(b->rank->world, memory) : status;
}

/* Makes the object and destroys it again. */
static usp_status make(bench *b, thing what) {
    usp_mesh *mesh = NULL;
    usp_sequence *sequence = NULL;
    usp_layer *layer = NULL;
    char bytes[TOKENS] = {0};
    usp_layer_config softmax = good_softmax(), linear = good_linear();
    usp_status status = USP_OK;
    linear.decay = good_decay;
    if (what == MESH) status = usp_mesh_create(b->rank->world, 1, b->rank->size, &mesh);
    if (what >= SEQUENCE && what <= CUSTOM_SEQUENCE) status = make_sequence(b, what, &sequence);
    if (what == SOFTMAX_LAYER) status = usp_layer_create(b->mesh, b->sequence, &softmax, &layer);
    if (what == LINEAR_LAYER) status = usp_layer_create(b->mesh, b->sequence, &linear, &layer);
    if (what == GATHER) status = usp_sequence_gather(b->sequence, 1, 1, bytes, bytes);
    if (what == SHARED_MEMORY) status = make_shared(b);
    usp_layer_destroy(layer);
    usp_sequence_destroy(sequence);
    usp_mesh_destroy(mesh);
    return status;
}

/* Lets allocation k of one rank fail. 1 if that happened, 0 if there are fewer, -1 after saying what was wrong. */
static int starve(bench *b, thing what, int victim, int k) {
    static const char *const names[OBJECTS] = {
        "mesh",   "sequence", "sequence with keys", "documents", "tree", "documents with keys", "segments", "softmax",
        "linear", "gather",   "shared memory"};
    int me = b->rank->rank == victim;
    if (me) usp_heap_arm(b->rank->heap, k);
    usp_status status = make(b, what);
    int refused = me ? usp_heap_disarm(b->rank->heap) : status != USP_OK;
    usp_status expected = !refused ? USP_OK : me ? USP_NO_MEMORY : USP_PEER_FAILED;
    int live = atomic_load(&b->rank->heap->live);
    if (status != expected)
        usp_say(b->rank, "%s, allocation %d of rank %d: %s, \"%s\"", names[what], k, victim, usp_status_string(status),
                usp_last_error());
    if (live != b->live) usp_say(b->rank, "%s, allocation %d: %d are left", names[what], k, live - b->live);
    b->live = live;
    return usp_world_poll(b->rank->world) != USP_OK || k > 1000 ? -1 : refused;
}

static int run_out_of_memory(usp_rank *rank, void *argument) {
    bench b;
    (void)argument;
    if (open_bench(rank, rank->size % 2 == 0 ? 2 : 1, &b)) return 1;
    for (int what = MESH; what < OBJECTS; what++)
        for (int victim = 0; victim < rank->size; victim++) {
            int refused = 1;
            for (int k = 1; refused > 0; k++) refused = starve(&b, (thing)what, victim, k);
            if (refused < 0) return usp_say(rank, "the world is lost");
        }
    close_bench(&b);
    usp_count(rank);
    return 0;
}

Test(api, no_memory_for_objects) {
    usp_expect_ranks(1, SECONDS, run_out_of_memory, NULL);
    usp_expect_ranks(2, SECONDS, run_out_of_memory, NULL);
    usp_expect_ranks(4, SECONDS, run_out_of_memory, NULL);
}

/* ---- arguments of running layers --------------------------------------------------------------------------------- */

/* A tensor of a call. */
typedef struct wrong_run {
    const char *name;
    size_t offset;
    int written;
} wrong_run;

/* What is wrong with it; from NO_STRIDES on only with one that is written. */
typedef enum spoil {
    NO_DATA,
    ODD_DATA,
    NO_STRIDES,
    ONE_BATCH,
    ONE_TOKEN,
    SHORT_HEADS,
    HUGE_STRIDE,
    DATA_OF_Q,
    DATA_OF_K,
    DATA_OF_V,
    SPOILS
} spoil;

static const wrong_run wrong_forwards[] = {
    {"q", offsetof(usp_forward, q), 0},
    {"k", offsetof(usp_forward, k), 0},
    {"v", offsetof(usp_forward, v), 0},
    {"out", offsetof(usp_forward, out), 1},
};
static const wrong_run wrong_backwards[] = {
    {"q", offsetof(usp_backward, q), 0},       {"k", offsetof(usp_backward, k), 0},
    {"v", offsetof(usp_backward, v), 0},       {"out", offsetof(usp_backward, out), 0},
    {"dout", offsetof(usp_backward, dout), 0}, {"dq", offsetof(usp_backward, dq), 1},
    {"dk", offsetof(usp_backward, dk), 1},     {"dv", offsetof(usp_backward, dv), 1},
};

static usp_status forward_with(usp_stage *s, const usp_forward *f, void *workspace, size_t bytes) {
    return usp_layer_forward(s->layer, f, workspace, bytes, s->rank->stream);
}

static usp_status backward_with(usp_stage *s, const usp_backward *b, void *workspace, size_t bytes) {
    return usp_layer_backward(s->layer, b, workspace, bytes, s->rank->stream);
}

static void expect_refusal(usp_rank *rank, usp_status expected, const char *name, usp_status status) {
    if (status != expected || !says(name))
        usp_say(rank, "run with a wrong %s: %s, \"%s\"", name, usp_status_string(status), usp_last_error());
}

static void give_pointer(void *arguments, size_t offset) {
    static float nobody_asked;
    float *pointer = &nobody_asked;
    memcpy((char *)arguments + offset, &pointer, sizeof pointer);
}

static void remove_pointer(void *fields, size_t offset) {
    memset((char *)fields + offset, 0, sizeof(void *));
}

static void spoil_tensor(usp_tensor *tensor, spoil how, const usp_tensor *q, const usp_tensor *k, const usp_tensor *v) {
    usp_tensor spoiled[SPOILS];
    for (int i = 0; i < SPOILS; i++) spoiled[i] = *tensor;
    spoiled[NO_DATA].data = NULL;
    spoiled[ODD_DATA].data = (char *)tensor->data + 1;
    spoiled[NO_STRIDES] = (usp_tensor){.data = tensor->data};
    spoiled[ONE_BATCH].stride_batch = 0;
    spoiled[ONE_TOKEN].stride_token = 0;
    spoiled[SHORT_HEADS].stride_head = 1;
    spoiled[HUGE_STRIDE].stride_token = INT64_MIN;
    spoiled[DATA_OF_Q].data = q->data;
    spoiled[DATA_OF_K].data = k->data;
    spoiled[DATA_OF_V].data = v->data;
    *tensor = spoiled[how];
}

static void try_forward_tensor(usp_stage *s, const wrong_run *run) {
    for (int how = 0; how < (run->written ? SPOILS : NO_STRIDES); how++) {
        usp_forward f = usp_stage_forward_arguments(s, 1);
        spoil_tensor((usp_tensor *)((char *)&f + run->offset), (spoil)how, &f.q, &f.k, &f.v);
        expect_refusal(s->rank, USP_INVALID, run->name,
                       forward_with(s, &f, s->workspace.device, s->sizes.forward_workspace));
    }
}

static void try_backward_tensor(usp_stage *s, const wrong_run *run) {
    for (int how = 0; how < (run->written ? SPOILS : NO_STRIDES); how++) {
        usp_backward b = usp_stage_backward_arguments(s);
        spoil_tensor((usp_tensor *)((char *)&b + run->offset), (spoil)how, &b.q, &b.k, &b.v);
        expect_refusal(s->rank, USP_INVALID, run->name,
                       backward_with(s, &b, s->workspace.device, s->sizes.backward_workspace));
    }
}

static void try_tensors(usp_stage *s) {
    for (int i = 0; i < (int)(sizeof wrong_forwards / sizeof wrong_forwards[0]); i++)
        try_forward_tensor(s, &wrong_forwards[i]);
    for (int i = 0; i < (int)(sizeof wrong_backwards / sizeof wrong_backwards[0]); i++)
        try_backward_tensor(s, &wrong_backwards[i]);
}

/* The exchange alone: the side that is written must have places of its own. */
static void try_exchange(usp_stage *s) {
    usp_forward f = usp_stage_forward_arguments(s, 1);
    usp_tensor flat = {.data = f.out.data};
    void *workspace = s->workspace.device;
    size_t bytes = s->sizes.exchange_workspace;
    if (bytes > s->workspace.bytes) return;
    expect_refusal(s->rank, USP_INVALID, "heads",
                   usp_layer_tokens_to_heads(s->layer, USP_QUERY, &f.q, &flat, workspace, bytes, s->rank->stream));
    expect_refusal(s->rank, USP_INVALID, "tokens",
                   usp_layer_heads_to_tokens(s->layer, USP_QUERY, &f.q, &flat, workspace, bytes, s->rank->stream));
}

static void make_odd(void *fields, size_t offset) {
    char *pointer;
    memcpy(&pointer, (char *)fields + offset, sizeof pointer);
    pointer += 2;
    memcpy((char *)fields + offset, &pointer, sizeof pointer);
}

static void try_forward_pointer(usp_stage *s, const char *name, size_t offset, void (*change)(void *, size_t)) {
    usp_forward f = usp_stage_forward_arguments(s, 1);
    change(&f, offset);
    expect_refusal(s->rank, USP_INVALID, name, forward_with(s, &f, s->workspace.device, s->sizes.forward_workspace));
}

static void try_backward_pointer(usp_stage *s, const char *name, size_t offset, void (*change)(void *, size_t)) {
    usp_backward b = usp_stage_backward_arguments(s);
    change(&b, offset);
    expect_refusal(s->rank, USP_INVALID, name, backward_with(s, &b, s->workspace.device, s->sizes.backward_workspace));
}

/* Numbers of a call, and the field of a case that asks for them. */
typedef struct option {
    const char *name;
    size_t offset, asked;
} option;

static const option forward_options[] = {
    {"lse", offsetof(usp_forward, lse), offsetof(usp_case, return_lse)},
    {"initial_state", offsetof(usp_forward, initial_state), offsetof(usp_case, initial_state)},
    {"final_state", offsetof(usp_forward, final_state), offsetof(usp_case, final_state)},
    {"sinks", offsetof(usp_forward, sinks), offsetof(usp_case, sinks)},
    {"max_logit", offsetof(usp_forward, max_logit), offsetof(usp_case, max_logit)},
    {"dropout_state", offsetof(usp_forward, dropout_state), offsetof(usp_case, dropout)},
};
static const option backward_options[] = {
    {"dfinal_state", offsetof(usp_backward, dfinal_state), offsetof(usp_case, final_state)},
    {"dinitial_state", offsetof(usp_backward, dinitial_state), offsetof(usp_case, initial_state)},
    {"initial_state", offsetof(usp_backward, initial_state), offsetof(usp_case, initial_state)},
    {"sinks", offsetof(usp_backward, sinks), offsetof(usp_case, sinks)},
    {"dsinks", offsetof(usp_backward, dsinks), offsetof(usp_case, sinks)},
    {"dlse", offsetof(usp_backward, dlse), offsetof(usp_case, dlse)},
    {"dropout_state", offsetof(usp_backward, dropout_state), offsetof(usp_case, dropout)},
};

/* Zero bytes of an int or a float are zero. */
static int is_asked(const usp_stage *s, const option *o) {
    int field;
    memcpy(&field, (const char *)&s->c + o->asked, sizeof field);
    return field != 0;
}

/* What the layer was made with must be there, on the boundaries of its elements; what it was not must not. */
static void try_options(usp_stage *s) {
    void (*const spoils[])(void *, size_t) = {remove_pointer, make_odd};
    for (int how = 0; how < 2; how++) {
        for (int i = 0; i < (int)(sizeof forward_options / sizeof forward_options[0]); i++)
            try_forward_pointer(s, forward_options[i].name, forward_options[i].offset,
                                is_asked(s, &forward_options[i]) ? spoils[how] : give_pointer);
        for (int i = 0; i < (int)(sizeof backward_options / sizeof backward_options[0]); i++)
            try_backward_pointer(s, backward_options[i].name, backward_options[i].offset,
                                 is_asked(s, &backward_options[i]) ? spoils[how] : give_pointer);
    }
}

static void try_memory(usp_stage *s) {
    usp_forward f = usp_stage_forward_arguments(s, 1);
    usp_backward b = usp_stage_backward_arguments(s);
    char *workspace = s->workspace.device;
    size_t forward = s->sizes.forward_saving_workspace, backward = s->sizes.backward_workspace;
    if (s->sizes.forward_workspace != forward + s->sizes.saved)
        usp_say(s->rank, "what a forward keeps is counted %s",
                s->sizes.forward_workspace > forward ? "twice" : "never");
    if (forward > 0) {
        expect_refusal(s->rank, USP_WORKSPACE, "workspace", forward_with(s, &f, workspace, forward - 1));
        expect_refusal(s->rank, USP_WORKSPACE, "workspace", forward_with(s, &f, NULL, forward));
        expect_refusal(s->rank, USP_WORKSPACE, "workspace", forward_with(s, &f, workspace + 1, forward));
    }
    if (backward > 0) {
        expect_refusal(s->rank, USP_WORKSPACE, "workspace", backward_with(s, &b, workspace, backward - 1));
        expect_refusal(s->rank, USP_WORKSPACE, "workspace", backward_with(s, &b, NULL, backward));
        expect_refusal(s->rank, USP_WORKSPACE, "workspace", backward_with(s, &b, workspace + 8, backward));
    }
    if (s->sizes.saved == 0) return;
    f.saved = NULL;
    expect_refusal(s->rank, USP_WORKSPACE, "workspace", forward_with(s, &f, workspace, s->sizes.forward_workspace - 1));
    f.saved = (char *)s->saved.device + 4;
    expect_refusal(s->rank, USP_WORKSPACE, "saved", forward_with(s, &f, workspace, forward));
    b.saved = (char *)s->saved.device + 4;
    expect_refusal(s->rank, USP_WORKSPACE, "saved", backward_with(s, &b, workspace, backward));
    b.saved = NULL;
    expect_refusal(s->rank, USP_WORKSPACE, "saved", backward_with(s, &b, workspace, backward));
}

static void try_structs(usp_stage *s) {
    void *workspace = s->workspace.device;
    usp_forward f = usp_stage_forward_arguments(s, 1);
    usp_backward b = usp_stage_backward_arguments(s);
    f.struct_size = 3;
    b.struct_size = 0;
    expect_refusal(s->rank, USP_INVALID, "struct_size", forward_with(s, &f, workspace, s->sizes.forward_workspace));
    expect_refusal(s->rank, USP_INVALID, "struct_size", backward_with(s, &b, workspace, s->sizes.backward_workspace));
    expect_refusal(s->rank, USP_INVALID, "NULL", forward_with(s, NULL, workspace, s->sizes.forward_workspace));
    expect_refusal(s->rank, USP_INVALID, "NULL", backward_with(s, NULL, workspace, s->sizes.backward_workspace));
}

/* Nothing that was poisoned is anything else by now. */
static void expect_untouched(usp_stage *s) {
    const usp_buffer *const results[] = {&s->memory[USP_O], &s->memory[USP_DQ], &s->memory[USP_DK], &s->memory[USP_DV],
                                         &s->lse,           &s->final_state,    &s->dinitial_state, &s->saved,
                                         &s->dsinks,        &s->max_logit};
    for (size_t i = 0; i < sizeof results / sizeof *results; i++) {
        if (!results[i]->host) continue;
        if (usp_buffer_download(results[i]) != USP_OK) usp_say(s->rank, "%s", usp_last_error());
        for (size_t j = 0; j < results[i]->bytes; j++)
            if (((const unsigned char *)results[i]->host)[j] != 0xff) {
                usp_say(s->rank, "a wrong run wrote byte %zu of result %zu", j, i);
                break;
            }
    }
}

/* All ranks err alike, so nobody waits; then the layer must still run. */
static int wrong_runs(usp_rank *rank, void *argument) {
    static const usp_case cases[] = {{.batch = 2, .tokens = 40, .mask = USP_MASK_CAUSAL, .return_lse = 1},
                                     {.batch = 2, .tokens = 40, .mask = USP_MASK_CAUSAL, .kv_heads = 2},
                                     {.batch = 2,
                                      .tokens = 40,
                                      .mask = USP_MASK_CAUSAL,
                                      .documents = 2,
                                      .return_lse = 1,
                                      .sinks = 1,
                                      .dlse = 1,
                                      .max_logit = 1,
                                      .dropout = 0.1f},
                                     {.attention = USP_LINEAR,
                                      .batch = 2,
                                      .tokens = 40,
                                      .mask = USP_MASK_CAUSAL,
                                      .initial_state = 1,
                                      .final_state = 1,
                                      .decay = 1},
                                     {.attention = USP_LINEAR, .batch = 2, .tokens = 40, .mask = USP_MASK_CAUSAL}};
    (void)argument;
    for (int i = 0; i < (int)(sizeof cases / sizeof cases[0]); i++) {
        usp_stage stage;
        usp_case c = cases[i];
        c.ring = rank->size;
        if (usp_stage_open(rank, &c, &stage) != USP_OK) return usp_say(rank, "%s", usp_last_error());
        if (usp_stage_fill(&stage)) return 1;
        if (usp_stage_clear(&stage)) return 1;
        int live = atomic_load(&rank->heap->live);
        try_tensors(&stage);
        try_exchange(&stage);
        try_options(&stage);
        try_memory(&stage);
        try_structs(&stage);
        expect_untouched(&stage);
        if (atomic_load(&rank->heap->live) != live) usp_say(rank, "wrong runs leave memory behind");
        if (usp_stage_forward(&stage, 1) || usp_stage_backward(&stage)) return 1;
        usp_stage_close(&stage);
    }
    usp_count(rank);
    return 0;
}

Test(api, wrong_runs) {
    usp_expect_ranks(1, SECONDS, wrong_runs, NULL);
    usp_expect_ranks(3, SECONDS, wrong_runs, NULL);
}

/* Run calls allocate nothing. */
static int no_allocation(usp_rank *rank, void *argument) {
    static const usp_case cases[] = {{.tokens = 40, .mask = USP_MASK_CAUSAL, .kv_heads = 1, .return_lse = 1},
                                     {.attention = USP_LINEAR,
                                      .tokens = 40,
                                      .mask = USP_MASK_CAUSAL,
                                      .initial_state = 1,
                                      .final_state = 1,
                                      .decay = 1}};
    (void)argument;
    for (int i = 0; i < 2; i++) {
        usp_stage stage;
        usp_case c = cases[i];
        c.ulysses = rank->size % 2 == 0 ? 2 : 1;
        c.ring = rank->size / c.ulysses;
        if (usp_stage_open(rank, &c, &stage) != USP_OK) return usp_say(rank, "%s", usp_last_error());
        if (usp_stage_fill(&stage)) return 1;
        usp_heap_arm(rank->heap, 0);
        if (usp_stage_forward(&stage, 1) || usp_stage_backward(&stage)) return 1;
        int calls = atomic_load(&rank->heap->calls);
        if (calls != 0) usp_say(rank, "forward and backward allocate %d times", calls);
        usp_stage_close(&stage);
    }
    usp_count(rank);
    return 0;
}

Test(api, runs_allocate_nothing) {
    usp_expect_ranks(1, SECONDS, no_allocation, NULL);
    usp_expect_ranks(4, SECONDS, no_allocation, NULL);
}

/* ---- structs of other versions ----------------------------------------------------------------------------------- */

/* A struct longer than the library's, and the canary around it. */
typedef struct longer_config {
    usp_sequence_config config;
    unsigned char more[24];
} longer_config;

static int check_longer_config(bench *b) {
    longer_config longer = {.config = good_sequence()};
    usp_sequence *sequence = NULL;
    longer.config.struct_size = sizeof longer;
    if (usp_sequence_create(b->mesh, &longer.config, &sequence) != USP_OK)
        return usp_say(b->rank, "a longer config of zeros: %s", usp_last_error());
    usp_sequence_destroy(sequence);
    sequence = NULL;
    longer.more[23] = 1;
    usp_status status = usp_sequence_create(b->mesh, &longer.config, &sequence);
    if (status != USP_INVALID || sequence || !says("struct_size")) usp_say(b->rank, "an unknown field is taken");
    return 0;
}

/* An older program's config ends early: what it does not know is default. */
static int check_shorter_config(bench *b) {
    unsigned char bytes[sizeof(usp_layer_config)];
    usp_layer_config config = good_softmax();
    usp_layer *layer = NULL;
    memset(bytes, CANARY, sizeof bytes);
    config.struct_size = offsetof(usp_layer_config, return_lse);
    memcpy(bytes, &config, config.struct_size);
    if (usp_layer_create(b->mesh, b->sequence, (const usp_layer_config *)(const void *)bytes, &layer) != USP_OK)
        return usp_say(b->rank, "a shorter config: %s", usp_last_error());
    usp_layer_destroy(layer);
    return 0;
}

typedef usp_status (*query)(const void *object, void *result);

static usp_status get_sizes(const void *layer, void *result) {
    return usp_layer_get_sizes(layer, result);
}

static usp_status get_cost(const void *layer, void *result) {
    return usp_layer_get_cost(layer, USP_PASS_BACKWARD, result);
}

static usp_status get_shard(const void *layer, void *result) {
    return usp_layer_get_shard(layer, result);
}

static usp_status get_info(const void *world, void *result) {
    return usp_world_get_info(world, result);
}

/* Results fill what the caller's struct_size has room for, and no more. */
static void check_query(usp_rank *rank, const char *name, query ask, const void *object, size_t size) {
    _Alignas(16) unsigned char whole[256], part[256];
    for (size_t room = sizeof(size_t); room <= size + 16; room += 4) {
        memset(whole, CANARY, sizeof whole);
        memset(part, CANARY, sizeof part);
        memcpy(whole, &size, sizeof size);
        memcpy(part, &room, sizeof room);
        if (ask(object, whole) != USP_OK || ask(object, part) != USP_OK)
            usp_say(rank, "%s: %s", name, usp_last_error());
        size_t known = room < size ? room : size;
        if (memcmp(whole + sizeof size, part + sizeof size, known - sizeof size) != 0)
            usp_say(rank, "%s of %zu bytes differs", name, room);
        for (size_t i = known; i < sizeof part; i++)
            if (part[i] != CANARY) usp_say(rank, "%s of %zu bytes is written at %zu", name, room, i);
    }
    memset(part, 0, sizeof part);
    if (ask(object, part) != USP_INVALID || !says("struct_size")) usp_say(rank, "%s without struct_size", name);
    if (ask(object, NULL) != USP_INVALID) usp_say(rank, "%s into NULL", name);
}

static void check_describe(usp_rank *rank, const usp_layer *layer) {
    char text[2048], part[2048];
    size_t length = usp_layer_describe(layer, NULL, 0);
    if (length == 0 || length >= sizeof text || usp_layer_describe(layer, text, sizeof text) != length ||
        strlen(text) != length)
        usp_say(rank, "describe: %zu", length);
    for (size_t capacity = 1; capacity <= length + 2 && capacity < sizeof text - 1; capacity++) {
        memset(part, CANARY, sizeof part);
        size_t said = usp_layer_describe(layer, part, capacity), cut = capacity - 1 < length ? capacity - 1 : length;
        if (said != length || memcmp(part, text, cut) != 0 || part[cut] != 0 || (unsigned char)part[cut + 1] != CANARY)
            usp_say(rank, "describe into %zu bytes", capacity);
    }
}

static int versions(usp_rank *rank, void *argument) {
    bench b;
    usp_layer *layer = NULL;
    usp_layer_config config = good_linear();
    (void)argument;
    if (open_bench(rank, 1, &b) || check_longer_config(&b) || check_shorter_config(&b)) return 1;
    if (usp_layer_create(b.mesh, b.sequence, &config, &layer) != USP_OK) return usp_say(rank, "%s", usp_last_error());
    check_query(rank, "usp_sizes", get_sizes, layer, sizeof(usp_sizes));
    check_query(rank, "usp_cost", get_cost, layer, sizeof(usp_cost));
    check_query(rank, "usp_shard", get_shard, layer, sizeof(usp_shard));
    check_query(rank, "usp_world_info", get_info, rank->world, sizeof(usp_world_info));
    check_describe(rank, layer);
    usp_layer_destroy(layer);
    close_bench(&b);
    usp_count(rank);
    return 0;
}

Test(api, structs_of_other_versions) {
    usp_expect_ranks(2, SECONDS, versions, NULL);
}

/* ---- small things ------------------------------------------------------------------------------------------------ */

Test(api, version_status_dtype) {
    cr_expect(usp_version() == USP_VERSION_MAJOR * 10000 + USP_VERSION_MINOR * 100 + USP_VERSION_PATCH);
    for (int i = -1; i <= USP_INTERNAL + 1; i++) {
        const char *sentence = usp_status_string((usp_status)i);
        cr_expect(sentence && sentence[0], "status %d has no sentence", i);
    }
    cr_expect(strcmp(usp_status_string(USP_OK), "success") == 0);
    cr_expect(usp_dtype_size(USP_F32) == 4 && usp_dtype_size(USP_F16) == 2 && usp_dtype_size(USP_BF16) == 2);
    cr_expect(usp_dtype_size((usp_dtype)3) == 0 && usp_dtype_size((usp_dtype)-1) == 0);
    cr_expect(usp_device_count(USP_DEVICE_CPU) == 1 && usp_device_count((usp_device_kind)9) == 0);
    cr_expect(usp_device_select(USP_DEVICE_CPU, 0) == USP_OK && usp_device_select(USP_DEVICE_CPU, 1) == USP_INVALID);
}

/* Every function takes NULL where an object should be, and says so. */
static int nulls(usp_rank *rank, void *argument) {
    int number;
    int64_t wide;
    void *memory = NULL;
    usp_tensor tensor = {0};
    usp_forward f = {.struct_size = sizeof f};
    usp_backward b = {.struct_size = sizeof b};
    struct ncclComm *comm = NULL;
    (void)argument;
    const usp_status results[] = {usp_world_get_info(NULL, NULL),
                                  usp_world_poll(NULL),
                                  usp_world_synchronize(NULL, NULL),
                                  usp_world_alloc(NULL, 1, &memory),
                                  usp_world_alloc(rank->world, 1, NULL),
                                  usp_world_copy(NULL, &number, &number, 1, NULL),
                                  usp_world_alloc_shared(NULL, 1, &memory),
                                  usp_world_free_shared(NULL, NULL),
                                  usp_mesh_create(NULL, 1, 1, NULL),
                                  usp_mesh_create(rank->world, 1, rank->size, NULL),
                                  usp_mesh_axis(NULL, USP_AXIS_RING, &number, &number),
                                  usp_mesh_axis_comm(NULL, USP_AXIS_RING, &comm),
                                  usp_sequence_create(NULL, NULL, NULL),
                                  usp_sequence_replan(NULL, 1, &wide, NULL),
                                  usp_sequence_segments(NULL, 0, 0, NULL, &wide),
                                  usp_sequence_to_local(NULL, 0, &number, &wide),
                                  usp_sequence_positions(NULL, NULL),
                                  usp_sequence_labels(NULL, NULL, 0, NULL),
                                  usp_sequence_scatter(NULL, 1, 1, NULL, NULL),
                                  usp_sequence_gather(NULL, 1, 1, NULL, NULL),
                                  usp_layer_create(NULL, NULL, NULL, NULL),
                                  usp_layer_get_sizes(NULL, NULL),
                                  usp_layer_get_cost(NULL, USP_PASS_FORWARD, NULL),
                                  usp_layer_get_shard(NULL, NULL),
                                  usp_layer_forward(NULL, &f, NULL, 0, NULL),
                                  usp_layer_backward(NULL, &b, NULL, 0, NULL),
                                  usp_layer_inner_forward(NULL, &f, NULL, 0, NULL),
                                  usp_layer_inner_backward(NULL, &b, NULL, 0, NULL),
                                  usp_layer_tokens_to_heads(NULL, USP_QUERY, &tensor, &tensor, NULL, 0, NULL),
                                  usp_layer_heads_to_tokens(NULL, USP_QUERY, &tensor, &tensor, NULL, 0, NULL),
                                  usp_rendezvous_create(1, NULL),
                                  usp_rendezvous_create(0, (usp_rendezvous **)&memory),
                                  usp_world_create_threads(NULL, NULL, 0, NULL),
                                  usp_world_create_callback(NULL, NULL, NULL, 1, 0, NULL),
                                  usp_world_create_env(NULL, NULL)};
    for (int i = 0; i < (int)(sizeof results / sizeof results[0]); i++)
        if (results[i] != USP_INVALID) usp_say(rank, "call %d with NULL: %s", i, usp_status_string(results[i]));
    if (usp_sequence_own_tokens(NULL) != -1 || usp_sequence_own_key_tokens(NULL) != -1 ||
        usp_sequence_local_tokens(NULL, 0) != -1 || usp_sequence_to_global(NULL, 0, 0) != -1 ||
        usp_layer_describe(NULL, NULL, 0) != 0)
        usp_say(rank, "a query of NULL answers");
    usp_layer_destroy(NULL);
    usp_sequence_destroy(NULL);
    usp_mesh_destroy(NULL);
    usp_world_destroy(NULL);
    usp_world_abort(NULL);
    usp_rendezvous_destroy(NULL);
    usp_world_free(rank->world, NULL);
    usp_count(rank);
    return 0;
}

Test(api, nulls) {
    usp_expect_ranks(1, SECONDS, nulls, NULL);
    usp_expect_ranks(2, SECONDS, nulls, NULL);
}

/* ---- bad arguments of the helpers -------------------------------------------------------------------------------- */

static int wrong_helpers(usp_rank *rank, void *argument) {
    bench b;
    int owner, axis, size;
    int64_t count;
    usp_segment segment;
    const int64_t ends[] = {TOKENS};
    (void)argument;
    if (open_bench(rank, 1, &b)) return 1;
    const usp_status results[] = {usp_mesh_axis(b.mesh, (usp_axis)4, &axis, &size),
                                  usp_mesh_axis(b.mesh, (usp_axis)-1, &axis, &size),
                                  usp_sequence_segments(b.sequence, rank->size, 1, &segment, &count),
                                  usp_sequence_segments(b.sequence, -1, 1, &segment, &count),
                                  usp_sequence_segments(b.sequence, 0, 1, NULL, &count),
                                  usp_sequence_segments(b.sequence, 0, -1, &segment, &count),
                                  usp_sequence_segments(b.sequence, 0, 1, &segment, NULL),
                                  usp_sequence_to_local(b.sequence, -1, &owner, &count),
                                  usp_sequence_to_local(b.sequence, TOKENS, &owner, &count),
                                  usp_sequence_to_local(b.sequence, 0, NULL, &count),
                                  usp_sequence_positions(b.sequence, NULL),
                                  usp_sequence_labels(b.sequence, NULL, 0, NULL),
                                  usp_sequence_scatter(b.sequence, 1, 4, NULL, NULL),
                                  usp_sequence_scatter(b.sequence, -1, 4, &count, &count),
                                  usp_sequence_scatter(b.sequence, INT64_MAX, 4, &count, &count),
                                  usp_sequence_scatter(b.sequence, INT64_MAX / TOKENS, SIZE_MAX / 2, &count, &count),
                                  usp_sequence_scatter(b.sequence, 1, SIZE_MAX, &count, &count),
                                  usp_sequence_gather(b.sequence, 1, 4, NULL, NULL),
                                  usp_sequence_gather(b.sequence, -1, 4, &count, &count),
                                  usp_sequence_gather(b.sequence, INT64_MAX, 1, &count, &count),
                                  usp_sequence_gather(b.sequence, 1, SIZE_MAX, &count, &count),
                                  usp_sequence_replan(b.sequence, 1, ends, NULL)};
    for (int i = 0; i < (int)(sizeof results / sizeof results[0]); i++)
        if (results[i] != USP_INVALID) usp_say(rank, "helper call %d: %s", i, usp_status_string(results[i]));
    if (usp_sequence_local_tokens(b.sequence, rank->size) != -1 ||
        usp_sequence_local_key_tokens(b.sequence, -1) != -1 || usp_sequence_to_global(b.sequence, 0, -1) != -1 ||
        usp_sequence_to_global(b.sequence, rank->size, 0) != -1)
        usp_say(rank, "a rank that does not exist has tokens");
    if (check_unharmed(&b, "helper")) return 1;
    close_bench(&b);
    usp_count(rank);
    return 0;
}

Test(api, wrong_helpers) {
    usp_expect_ranks(1, SECONDS, wrong_helpers, NULL);
    usp_expect_ranks(4, SECONDS, wrong_helpers, NULL);
}
