/* layer.c - creating a layer, and what can be asked of it. Running it is run.c. */
#include "layer.h"
#include "abi.h"
#include "error.h"
#include "exchange.h"
#include "run.h"
#include "size.h"
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

/* ---- heads ------------------------------------------------------------------------------------------------------- */

static int first_out_head(const usp_layer *layer, int u) {
    return (int)((int64_t)u * layer->heads / layer->mesh.ulysses);
}

usp_head_range usp_layer_heads(const usp_layer *layer, usp_operand operand, int u) {
    int begin = first_out_head(layer, u), end = first_out_head(layer, u + 1);
    int group = layer->heads / layer->total[operand];
    if (begin == end) return (usp_head_range){begin / group, 0};
    return (usp_head_range){begin / group, (end - 1) / group - begin / group + 1};
}

usp_head_map usp_layer_head_map(const usp_layer *layer, usp_operand operand) {
    int group = layer->heads / layer->total[operand];
    return (usp_head_map){group, first_out_head(layer, layer->mesh.u) % group};
}

/* Do several ulysses ranks hold some head of the operand? */
static int has_replicas(const usp_layer *layer, usp_operand operand) {
    int end = 0;
    for (int u = 0; u < layer->mesh.ulysses; u++) {
        usp_head_range heads = usp_layer_heads(layer, operand, u);
        if (!heads.count) continue;
        if (heads.first < end) return 1;
        end = heads.first + heads.count;
    }
    return 0;
}

static void set_operands(usp_layer *layer) {
    const usp_layer_config *c = &layer->config;
    const int dims[USP_OPERANDS] = {c->head_dim, c->head_dim, c->value_dim, c->value_dim};
    layer->heads = usp_layer_config_heads(c);
    for (int i = 0; i < USP_OPERANDS; i++) {
        layer->total[i] = usp_layer_config_operand_heads(c, (usp_operand)i);
        layer->dim[i] = dims[i];
    }
    for (int i = 0; i < USP_OPERANDS; i++) layer->shared[i] = has_replicas(layer, (usp_operand)i);
}

/* ---- create ------------------------------------------------------------------------------------------------------ */

static usp_status check_sequence(const usp_mesh *mesh, const usp_sequence *sequence, const usp_layer_config *config) {
    USP_REQUIRE(sequence, "sequence is NULL");
    USP_REQUIRE(sequence->world == mesh->world, "the sequence is of another world than the mesh");
    USP_REQUIRE(sequence->ranks == mesh->ranks && sequence->rank == mesh->p,
                "the sequence is spread over %d ranks, the mesh has ulysses x ring = %d", sequence->ranks, mesh->ranks);
    if (sequence->cross && config->mask == USP_MASK_CAUSAL)
        return usp_fail(USP_UNSUPPORTED,
                        "usp_layer_config.mask is causal: queries and keys of different length have no "
                        "common positions");
    return USP_OK;
}

/* Buffers are counted in 64 bits: far fewer than 64 of them, each of one number for every element of a whole tensor or
 * of all states, must fit. */
static usp_status check_size(const usp_sequence *sequence, const usp_layer_config *c) {
    enum { BUFFERS = 64 };
    int linear = c->attention == USP_LINEAR, most = c->head_dim > c->value_dim ? c->head_dim : c->value_dim;
    uint64_t tokens = (uint64_t)(sequence->max_tokens + sequence->key.tokens);
    uint64_t states = linear ? tokens + (uint64_t)sequence->query.capacity + 1 : 0;
    int64_t bytes = 0;
    const usp_factor rows[] = {{"usp_layer_config.batch", (uint64_t)c->batch},
                               {"heads", (uint64_t)usp_layer_config_heads(c)},
                               {"head_dim or value_dim", (uint64_t)most},
                               {"tokens", tokens},
                               {"bytes", BUFFERS * sizeof(float)}};
    const usp_factor matrices[] = {{"usp_layer_config.batch", (uint64_t)c->batch},
                                   {"heads", (uint64_t)usp_layer_config_heads(c)},
                                   {"head_dim", (uint64_t)c->head_dim},
                                   {"value_dim", (uint64_t)c->value_dim},
                                   {"states", states},
                                   {"bytes", BUFFERS * sizeof(float)}};
    USP_TRY(usp_size_add(&bytes, rows, 5));
    return usp_size_add(&bytes, matrices, 6);
}

static usp_kernel_shape kernel_shape(const usp_layer_config *c) {
    return (usp_kernel_shape){.attention = c->attention,
                              .dtype = c->dtype,
                              .batch = c->batch,
                              .heads = usp_layer_config_heads(c),
                              .dim = c->head_dim,
                              .value_dim = c->value_dim,
                              .deterministic = c->deterministic};
}

static usp_status check_kernels(const usp_mesh *mesh, const usp_layer_config *c) {
    usp_device *device = mesh->world->device;
    usp_kernel_shape shape = kernel_shape(c);
    return device->ops->supports(device, &shape);
}

static size_t kernel_scratch(const usp_layer *layer) {
    usp_device *device = layer->world->device;
    usp_kernel_shape shape = kernel_shape(&layer->config);
    return device->ops->scratch(device, &shape);
}

/* Most states of any one exchange: all chunks' from ring rank to ring rank, or one to and from every rank of an axis.
 */
static int64_t state_capacity(const usp_layer *layer) {
    int64_t ring = layer->mesh.ring, gathered = layer->schedule->own_chunk_limit * ring;
    return gathered + layer->schedule->chunk_capacity + 2 * (ring + layer->mesh.ulysses);
}

/* Most messages of any one exchange, one way: two bundles' to or from all peers, and states. Lists of them are counted
 * in 32 bits. */
static usp_status count_messages(const usp_layer *layer, int64_t *capacity) {
    int64_t queries = layer->sequence->query.segment_limit, keys = layer->sequence->key.segment_limit;
    const usp_factor factors[] = {
        {"usp_sequence_config.segments or documents, of a rank", (uint64_t)(queries > keys ? queries : keys)},
        {"ulysses", (uint64_t)layer->mesh.ulysses},
        {"messages", 2}};
    *capacity = state_capacity(layer) + 8;
    USP_TRY(usp_size_add(capacity, factors, 3));
    USP_REQUIRE(*capacity <= INT32_MAX / 2,
                "usp_sequence_config: %lld segments or documents of a rank take %lld messages",
                (long long)factors[0].value, (long long)*capacity);
    return USP_OK;
}

static usp_status allocate_messages(usp_layer *layer, int64_t capacity) {
    USP_TRY(usp_host_alloc(&layer->world->host, (size_t)capacity * (sizeof(usp_send) + sizeof(usp_recv)), "messages",
                           &layer->message_memory));
    layer->messages.send = layer->message_memory;
    layer->messages.recv = (usp_recv *)(layer->messages.send + capacity);
    return USP_OK;
}

/* No exchange moves more than a workspace and what is saved hold, but for states, of which one goes to many ranks. */
static usp_status prepare_transport(usp_layer *layer, int64_t messages) {
    usp_comm *comm = layer->world->comm;
    size_t forward = layer->sizes.forward_saving_workspace, backward = layer->sizes.backward_workspace;
    int64_t most = (int64_t)((forward > backward ? forward : backward) + layer->sizes.saved);
    int linear = layer->config.attention == USP_LINEAR;
    const usp_factor states[] = {{"states of an exchange", linear ? (uint64_t)state_capacity(layer) : 0},
                                 {"head_dim x value_dim", (uint64_t)usp_layer_state_elements(layer)},
                                 {"usp_layer_config.batch", (uint64_t)layer->config.batch},
                                 {"heads", (uint64_t)layer->heads},
                                 {"bytes", sizeof(float)}};
    USP_TRY(usp_size_add(&most, states, 5));
    return comm->ops->prepare(comm, 2 * messages, (size_t)most);
}

static usp_status upload_decay(usp_layer *layer, const float *decay) {
    usp_device *device = layer->world->device;
    usp_head_range own = usp_layer_heads(layer, USP_OUT, layer->mesh.u);
    void *memory = NULL;
    if (!decay) return USP_OK;
    size_t bytes = (size_t)own.count * sizeof(float);
    USP_TRY(device->ops->alloc(device, bytes ? bytes : sizeof(float), &memory));
    layer->decay = memory;
    if (bytes) USP_TRY(device->ops->copy(device, layer->decay, decay + own.first, bytes, NULL));
    return usp_world_wait(layer->world, NULL); /* the caller's array is free again */
}

static usp_status build(usp_layer *layer, const float *decay) {
    const usp_mesh *mesh = &layer->mesh;
    int64_t messages = 0;
    set_operands(layer);
    layer->attn = layer->config.attention == USP_SOFTMAX ? &usp_attn_softmax : &usp_attn_linear;
    usp_shape shape = {mesh->ulysses, mesh->ring, mesh->u, mesh->r, layer->config.attention, layer->config.mask};
    USP_TRY(usp_schedule_acquire(layer->sequence, &shape, &layer->schedule));
    layer->scratch = kernel_scratch(layer);
    layer->sizes = usp_run_sizes(layer);
    USP_TRY(count_messages(layer, &messages));
    USP_TRY(allocate_messages(layer, messages));
    USP_TRY(prepare_transport(layer, messages));
    return upload_decay(layer, decay);
}

static void free_layer(usp_object *object) {
    usp_layer *layer = (usp_layer *)object;
    usp_device *device = layer->world->device;
    usp_schedule_release(layer->sequence, layer->schedule);
    if (layer->decay) device->ops->free(device, layer->decay);
    usp_host_free(&layer->world->host, layer->message_memory);
    usp_host_free(&layer->world->host, layer);
}

static usp_status create(const usp_mesh *mesh, usp_sequence *sequence, const usp_layer_config *given,
                         usp_layer **out) {
    usp_layer_config config = {0};
    void *memory = NULL;
    usp_status status = usp_layer_config_resolve(given, &config);
    if (status == USP_OK) status = check_sequence(mesh, sequence, &config);
    if (status == USP_OK) status = check_size(sequence, &config);
    if (status == USP_OK) status = check_kernels(mesh, &config);
    if (status == USP_OK && !out) status = usp_fail(USP_INVALID, "layer is NULL");
    if (status == USP_OK) status = usp_host_alloc(&mesh->world->host, sizeof(usp_layer), "layer", &memory);
    status = usp_layer_config_agree(mesh, status, &config, sequence);
    if (status != USP_OK) {
        usp_host_free(&mesh->world->host, memory);
        return status;
    }
    usp_layer *layer = memory;
    *layer = (usp_layer){.world = mesh->world, .mesh = *mesh, .sequence = sequence, .config = config};
    layer->config.decay = NULL;
    usp_object_begin(&layer->object, mesh->world, &sequence->object, free_layer);
    status = build(layer, config.decay);
    status = usp_world_agree(mesh->world, status, &(usp_agreement){.what = "layer"});
    if (status != USP_OK) {
        usp_layer_destroy(layer);
        return status;
    }
    *out = layer;
    return USP_OK;
}

usp_status usp_layer_create(const usp_mesh *mesh, usp_sequence *sequence, const usp_layer_config *config,
                            usp_layer **layer) {
    USP_REQUIRE(mesh, "mesh is NULL");
    USP_TRY(usp_guard_enter(mesh->world));
    return usp_guard_leave(mesh->world, create(mesh, sequence, config, layer));
}

void usp_layer_destroy(usp_layer *layer) {
    if (layer) usp_object_drop(&layer->object);
}

/* ---- queries ----------------------------------------------------------------------------------------------------- */

usp_status usp_layer_get_sizes(const usp_layer *layer, usp_sizes *sizes) {
    USP_REQUIRE(layer, "layer is NULL");
    USP_TRY(usp_guard_process(layer->world));
    return usp_abi_write(&layer->sizes, sizeof layer->sizes, sizes, "usp_sizes");
}

static void add_flops(const usp_layer *layer, usp_pass pass, usp_cost *cost) {
    int ring = layer->mesh.ring, ulysses = layer->mesh.ulysses;
    for (int r = 0; r < ring; r++)
        for (int u = 0; u < ulysses; u++) {
            double heads = (double)layer->config.batch * usp_layer_heads(layer, USP_OUT, u).count;
            double flops = layer->attn->flops(layer, pass, r) * heads;
            cost->flops_mean += flops / (ring * ulysses);
            if (flops > cost->flops_max) cost->flops_max = flops;
            if (r == layer->mesh.r && u == layer->mesh.u) cost->flops = flops;
        }
}

usp_status usp_layer_get_cost(const usp_layer *layer, usp_pass pass, usp_cost *cost) {
    USP_REQUIRE(layer, "layer is NULL");
    USP_TRY(usp_guard_process(layer->world));
    USP_REQUIRE(pass == USP_PASS_FORWARD || pass == USP_PASS_BACKWARD, "pass is %d: forward or backward", (int)pass);
    usp_cost known = {0};
    usp_messages ulysses = {0}, ring = {0};
    usp_run_count_messages(layer, pass, &ulysses);
    layer->attn->count_messages(layer, pass, &ring);
    known.ulysses_send = ulysses.bytes_sent;
    known.ulysses_recv = ulysses.bytes_received;
    known.ring_send = ring.bytes_sent;
    known.ring_recv = ring.bytes_received;
    add_flops(layer, pass, &known);
    return usp_abi_write(&known, sizeof known, cost, "usp_cost");
}

usp_status usp_layer_get_shard(const usp_layer *layer, usp_shard *shard) {
    USP_REQUIRE(layer, "layer is NULL");
    USP_TRY(usp_guard_process(layer->world));
    usp_head_range heads[USP_OPERANDS];
    for (int i = 0; i < USP_OPERANDS; i++) heads[i] = usp_layer_heads(layer, (usp_operand)i, layer->mesh.u);
    usp_shard known = {.tokens = layer->schedule->query.block[layer->mesh.r].rows,
                       .key_tokens = layer->schedule->key.block[layer->mesh.r].rows,
                       .first_head = heads[USP_QUERY].first,
                       .heads = heads[USP_QUERY].count,
                       .first_key_head = heads[USP_KEY].first,
                       .key_heads = heads[USP_KEY].count,
                       .first_value_head = heads[USP_VALUE].first,
                       .value_heads = heads[USP_VALUE].count,
                       .first_out_head = heads[USP_OUT].first,
                       .out_heads = heads[USP_OUT].count};
    return usp_abi_write(&known, sizeof known, shard, "usp_shard");
}

/* A text under construction, cut to its capacity. */
typedef struct text {
    char *to;
    size_t capacity, length;
} text;

static void __attribute__((format(printf, 2, 3))) say(text *t, const char *format, ...) {
    va_list arguments;
    size_t room = t->length < t->capacity ? t->capacity - t->length : 0;
    va_start(arguments, format);
    int length = vsnprintf(room ? t->to + t->length : NULL, room, format, arguments);
    va_end(arguments);
    if (length > 0) t->length += (size_t)length;
}

static void say_shape(text *t, const usp_layer *layer) {
    static const char *dtypes[] = {"f32", "f16", "bf16"};
    static const char *layouts[] = {"zigzag", "contiguous", "stripe", "zigzag per document", "custom"};
    const usp_layer_config *c = &layer->config;
    say(t, "%s attention, %s, %s\n", layer->attn->name, c->mask == USP_MASK_CAUSAL ? "causal" : "full",
        dtypes[c->dtype]);
    say(t,
        "  shape     batch %d, tokens %lld, keys %lld, heads %d, kv_heads %d, value_heads %d, head_dim %d, value_dim "
        "%d\n",
        c->batch, (long long)layer->sequence->query.tokens, (long long)layer->sequence->key.tokens, c->heads,
        c->kv_heads, c->value_heads, c->head_dim, c->value_dim);
    say(t, "  mesh      ulysses %d (rank %d) x ring %d (rank %d), copy %d of %d\n", layer->mesh.ulysses, layer->mesh.u,
        layer->mesh.ring, layer->mesh.r, layer->mesh.copy, layer->mesh.copies);
    say(t, "  layout    %s, %lld own tokens\n", layouts[layer->sequence->layout],
        (long long)layer->sequence->query.local[layer->mesh.p]);
}

static void say_cost(text *t, const usp_layer *layer, usp_pass pass) {
    usp_cost cost = {.struct_size = sizeof cost};
    usp_layer_get_cost(layer, pass, &cost);
    say(t, "  %s  %.4g GFLOP (busiest rank %.3g x the mean), sends %lld bytes ulysses, %lld bytes ring\n",
        pass == USP_PASS_FORWARD ? "forward " : "backward", cost.flops * 1e-9,
        cost.flops_mean > 0 ? cost.flops_max / cost.flops_mean : 1, (long long)cost.ulysses_send,
        (long long)cost.ring_send);
}

size_t usp_layer_describe(const usp_layer *layer, char *to, size_t capacity) {
    text t = {to, to ? capacity : 0, 0};
    if (t.capacity) to[0] = 0;
    if (!layer) return 0;
    usp_head_range own = usp_layer_heads(layer, USP_OUT, layer->mesh.u);
    say_shape(&t, layer);
    say(&t, "  inner     %lld tokens, heads %d .. %d\n", (long long)layer->schedule->query.block[layer->mesh.r].rows,
        own.first, own.first + own.count - 1);
    say_cost(&t, layer, USP_PASS_FORWARD);
    say_cost(&t, layer, USP_PASS_BACKWARD);
    say(&t, "  memory    workspace %zu forward (%zu if it saves), %zu backward, saved %zu bytes\n",
        layer->sizes.forward_workspace, layer->sizes.forward_saving_workspace, layer->sizes.backward_workspace,
        layer->sizes.saved);
    return t.length;
}
