/* layer.c - creates layers. Running them is run.c, what can be asked of them cost.c and describe.c. */
#include "layer.h"
#include "error.h"
#include "exchange.h"
#include "run.h"
#include "size.h"
#include "slices.h"

/* ---- checks ------------------------------------------------------------------------------------------------------ */

static usp_status check_documents(const usp_sequence *sequence, const usp_layer_config *c) {
    const char *field = sequence->trees ? "parents" : "prefixes";
    int family = sequence->trees || sequence->prefixes;
    if (family && c->mask != USP_MASK_CAUSAL)
        return usp_fail(USP_UNSUPPORTED,
                        "usp_layer_config.mask is full: the sequence has %s, which say how much more "
                        "than a causal mask is seen",
                        field);
    if (family && c->attention == USP_LINEAR)
        return usp_fail(USP_UNSUPPORTED, "linear attention has no state for the sequence's %s", field);
    if (sequence->trees && (c->window_left || c->slopes))
        return usp_fail(USP_UNSUPPORTED,
                        "usp_layer_config.%s is set: in trees tokens side by side are not next to "
                        "each other",
                        c->slopes ? "slopes" : "window_left");
    if (c->attention == USP_LINEAR && c->mask != USP_MASK_CAUSAL && !usp_sequence_is_whole(sequence))
        return usp_fail(USP_UNSUPPORTED,
                        "usp_layer_config.mask is full: bidirectional linear attention has one state, the sequence "
                        "room for %lld documents, of which the last one may end before its tokens do",
                        (long long)sequence->documents.capacity);
    return USP_OK;
}

static usp_status check_sequence(const usp_mesh *mesh, const usp_sequence *sequence, const usp_layer_config *config) {
    USP_REQUIRE(sequence, "sequence is NULL");
    USP_REQUIRE(sequence->world == mesh->world, "the sequence is of another world than the mesh");
    USP_REQUIRE(sequence->ranks == mesh->ranks && sequence->rank == mesh->p,
                "the sequence is spread over %d ranks, the mesh has ulysses x ring = %d", sequence->ranks, mesh->ranks);
    return check_documents(sequence, config);
}

/* Buffers are counted in 64 bits: far fewer than 64 of them, each of one number for every element of a whole tensor or
 * of all states, must fit. */
static usp_status check_size(const usp_sequence *sequence, const usp_layer_config *c) {
    enum { BUFFERS = 64 };
    int linear = c->attention == USP_LINEAR, most = c->head_dim > c->value_dim ? c->head_dim : c->value_dim;
    uint64_t tokens = (uint64_t)(sequence->query.max_tokens + sequence->key.max_tokens);
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

/* ---- lists ------------------------------------------------------------------------------------------------------- */

/* Most states of any one exchange: all chunks' between ring ranks, or one to and from every rank of an axis. */
static int64_t state_capacity(const usp_layer *layer) {
    int64_t ring = layer->mesh.ring, gathered = layer->plan->chunks.own_chunk_limit * ring;
    return gathered + layer->plan->chunks.chunk_capacity + 2 * (ring + layer->mesh.ulysses);
}

/* Most messages of any one exchange, one way: each bundle's to or from all peers; keys, in parts, and gradients;
 * states. */
static int64_t most_messages(const usp_layer *layer) {
    int64_t heads = USP_MOST_BUNDLES * (int64_t)layer->mesh.ulysses;
    return usp_bundle_messages(layer, USP_MOST_BUNDLES) + heads + (USP_MOST_PIECES + 3) * layer->mesh.ring + 8;
}

static usp_status allocate_lists(usp_layer *layer, int64_t messages) {
    int64_t copies = usp_bundle_copies(layer, USP_MOST_BUNDLES) + 2 * layer->mesh.ring + 2 * layer->heads;
    size_t bytes = 2 * (size_t)messages * sizeof(usp_message) + (size_t)copies * sizeof(usp_copy);
    USP_TRY(usp_host_alloc(&layer->world->host, bytes, "messages", &layer->list_memory));
    layer->copies.copy = layer->list_memory;
    layer->messages.send = (usp_message *)(layer->copies.copy + copies);
    layer->messages.recv = layer->messages.send + messages;
    return USP_OK;
}

/* No exchange moves more than a workspace and what is saved hold, but for states, of which one goes to many ranks, and
 * own keys, which all readers get. */
static usp_status prepare_transport(usp_layer *layer, int64_t messages) {
    usp_transport *transport = layer->world->transport;
    size_t forward = layer->sizes.forward_saving_workspace, backward = layer->sizes.backward_workspace;
    int64_t most = (int64_t)((forward > backward ? forward : backward) + layer->sizes.saved);
    int linear = layer->config.attention == USP_LINEAR;
    const usp_factor states[] = {{"states of an exchange", linear ? (uint64_t)state_capacity(layer) : 0},
                                 {"head_dim x value_dim", (uint64_t)usp_layer_state_elements(layer)},
                                 {"usp_layer_config.batch", (uint64_t)layer->config.batch},
                                 {"heads", (uint64_t)layer->heads},
                                 {"bytes", sizeof(float)}};
    const usp_factor keys[] = {{"rows of keys", linear ? 0 : (uint64_t)layer->plan->route.reader_limit},
                               {"head_dim + value_dim", (uint64_t)(layer->dim[USP_KEY] + layer->dim[USP_VALUE])},
                               {"usp_layer_config.batch", (uint64_t)layer->config.batch},
                               {"heads", (uint64_t)layer->heads},
                               {"bytes", 2 * sizeof(float)}};
    USP_TRY(usp_size_add(&most, states, 5));
    USP_TRY(usp_size_add(&most, keys, 5));
    if (transport->near) USP_TRY(transport->near->ops->prepare(transport->near, 2 * messages, (size_t)most));
    return transport->ops->prepare(transport, 2 * messages, (size_t)most);
}

/* ---- create ------------------------------------------------------------------------------------------------------ */

/* Own heads of one number a head, on the device; NULL: none. */
static usp_status upload_heads(usp_layer *layer, const float *numbers, float **to) {
    usp_device *device = layer->world->device;
    usp_head_range own = usp_layer_heads(layer, USP_OUT, layer->mesh.u);
    void *memory = NULL;
    if (!numbers) return USP_OK;
    size_t bytes = (size_t)own.count * sizeof(float);
    USP_TRY(device->ops->alloc(device, bytes ? bytes : sizeof(float), &memory));
    *to = memory;
    if (bytes) USP_TRY(device->ops->copy(device, *to, numbers + own.first, bytes, NULL));
    return usp_world_wait(layer->world, NULL); /* the caller's array is free again */
}

static usp_shape shape_of(const usp_layer *layer) {
    const usp_layer_config *c = &layer->config;
    const usp_mesh *mesh = &layer->mesh;
    return (usp_shape){{mesh->ulysses, mesh->ring, mesh->u, mesh->r},
                       c->attention,
                       usp_rule_of(c->mask, c->window_left, c->window_right, c->alignment),
                       c->route};
}

static int some_lane_reaches(const usp_mesh *mesh) {
    return mesh->lane[USP_AXIS_ULYSSES].transport->ops->reaches || mesh->lane[USP_AXIS_RING].transport->ops->reaches;
}

/* Collective: whether what is sent may arrive in what calls get: all ranks of the mesh must carve it to one shape. */
static usp_status compare_shapes(usp_layer *layer, uint64_t mine) {
    void *memory = NULL;
    int first = layer->mesh.copy * layer->mesh.ranks;
    usp_status status = usp_world_gather(layer->world, "layer's shape", &mine, sizeof mine, sizeof mine, &memory);
    const uint64_t *all = memory;
    layer->alike = layer->config.shared_memory && status == USP_OK && some_lane_reaches(&layer->mesh);
    for (int p = 0; p < layer->mesh.ranks && layer->alike; p++) layer->alike = all[first + p] == mine;
    usp_host_free(&layer->world->host, memory);
    return status;
}

static usp_status build(usp_layer *layer, const float *decay, const float *slopes, uint64_t *carved) {
    usp_device *device = layer->world->device;
    usp_kernel_shape kernels = kernel_shape(&layer->config);
    int64_t messages = most_messages(layer);
    usp_layer_set_heads(layer);
    layer->attn = usp_attn_kinds[layer->config.attention - 1];
    usp_shape shape = shape_of(layer);
    USP_TRY(usp_plan_acquire(layer->sequence, &shape, &layer->plan));
    layer->needs = device->ops->needs(device, &kernels);
    layer->groups = usp_group_count(layer);
    layer->sizes = usp_run_sizes(layer, carved);
    USP_TRY(allocate_lists(layer, messages));
    USP_TRY(prepare_transport(layer, messages));
    USP_TRY(upload_heads(layer, decay, &layer->decay));
    return upload_heads(layer, slopes, &layer->slopes);
}

static void free_layer(usp_object *object) {
    usp_layer *layer = (usp_layer *)object;
    usp_device *device = layer->world->device;
    usp_plan_release(layer->sequence, layer->plan);
    device->ops->free(device, layer->decay);
    device->ops->free(device, layer->slopes);
    usp_host_free(&layer->world->host, layer->list_memory);
    usp_host_free(&layer->world->host, layer);
}

static usp_status create(const usp_mesh *mesh, usp_sequence *sequence, const usp_layer_config *given, usp_layer **out) {
    usp_layer_config config = {0};
    usp_device *device = mesh->world->device;
    void *memory = NULL;
    usp_status status = usp_layer_config_resolve(given, &config);
    usp_kernel_shape kernels = kernel_shape(&config);
    if (status == USP_OK) status = check_sequence(mesh, sequence, &config);
    if (status == USP_OK) status = check_size(sequence, &config);
    if (status == USP_OK) status = device->ops->supports(device, &kernels);
    if (status == USP_OK && !out) status = usp_fail(USP_INVALID, "layer is NULL");
    if (status == USP_OK) status = usp_host_alloc(&mesh->world->host, sizeof(usp_layer), "layer", &memory);
    status = usp_layer_config_agree(mesh, status, &config, sequence);
    if (status != USP_OK) {
        usp_host_free(&mesh->world->host, memory);
        return status;
    }
    usp_layer *layer = memory;
    *layer = (usp_layer){.world = mesh->world, .mesh = *mesh, .sequence = sequence, .config = config};
    layer->config.decay = layer->config.slopes = NULL;
    usp_object_begin(&layer->object, mesh->world, &sequence->object, free_layer);
    uint64_t carved = 0;
    status = build(layer, config.decay, config.slopes, &carved);
    status = usp_world_agree(mesh->world, status, &(usp_agreement){.what = "layer"});
    if (status == USP_OK) status = compare_shapes(layer, carved);
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
