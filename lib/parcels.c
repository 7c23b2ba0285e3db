/* parcels.c - posts, packs and adds what a plan's parcels name. */
#include "parcels.h"
#include "error.h"

usp_bundle usp_parcels_bundle(const usp_layer *layer) {
    usp_bundle bundle = {.parts = 2, .keys = 1, .wire = layer->config.dtype};
    bundle.part[0] = (usp_bundle_part){.like = USP_KEY, .dim = layer->dim[USP_KEY]};
    bundle.part[1] = (usp_bundle_part){.like = USP_VALUE, .dim = layer->dim[USP_VALUE]};
    return bundle;
}

int64_t usp_parcels_bytes(const usp_layer *layer, int64_t rows, usp_dtype dtype) {
    usp_bundle bundle = usp_parcels_bundle(layer);
    return rows * layer->config.batch * usp_bundle_row(layer, &bundle, layer->mesh.u) * (int64_t)usp_dtype_size(dtype);
}

static int64_t key_bytes(const usp_layer *layer, int64_t rows) {
    return usp_parcels_bytes(layer, rows, layer->config.dtype);
}

static int64_t gradient_bytes(const usp_layer *layer, int64_t rows) {
    return usp_parcels_bytes(layer, rows, USP_F32);
}

static char *at(void *base, int64_t bytes) {
    return base ? (char *)base + bytes : NULL;
}

static const usp_route_stage *stage_of(const usp_layer *layer, int t) {
    return &layer->plan->route.stage[t];
}

static const usp_parcel *reader_of(const usp_layer *layer, int t, int64_t i) {
    return &layer->plan->route.reader[stage_of(layer, t)->reader + i];
}

static const usp_parcel *source_of(const usp_layer *layer, int t, int64_t i) {
    return &layer->plan->route.source[stage_of(layer, t)->source + i];
}

static const int32_t *map_of(const usp_layer *layer, const usp_parcel *parcel) {
    return parcel->map >= 0 ? layer->plan->device.map + parcel->map : NULL;
}

/* Rows of one part behind `before` elements. */
static usp_tensor part_block(const usp_layer *layer, void *block, int64_t before, int64_t row, int part) {
    usp_bundle bundle = usp_parcels_bundle(layer);
    return (usp_tensor){at(block, before), row, row * layer->config.batch, bundle.part[part].dim};
}

/* Elements of a row of one part: of own heads, or a slice of them. */
static int64_t part_row(const usp_layer *layer, int part, int slices) {
    usp_bundle bundle = usp_parcels_bundle(layer);
    int heads = usp_layer_heads(layer, bundle.part[part].like, layer->mesh.u).count;
    return (int64_t)heads / slices * bundle.part[part].dim;
}

usp_tensor usp_parcels_block(const usp_layer *layer, void *block, int64_t rows, int part) {
    usp_bundle bundle = usp_parcels_bundle(layer);
    int64_t size = (int64_t)usp_dtype_size(layer->config.dtype);
    int64_t before = part ? rows * layer->config.batch * part_row(layer, 0, 1) * size : 0;
    if (!usp_parcels_go_in_parts(layer)) return usp_bundle_block(layer, &bundle, block, layer->config.dtype, part);
    return part_block(layer, block, before, part_row(layer, part, 1), part);
}

/* ---- keys -------------------------------------------------------------------------------------------------------- */

void usp_parcels_pack(usp_layer *layer, int t, const usp_key_memory *memory) {
    usp_bundle bundle = usp_parcels_bundle(layer);
    usp_dtype dtype = layer->config.dtype;
    int64_t done = 0;
    for (int64_t i = 0; i < stage_of(layer, t)->readers; i++) {
        const usp_parcel *parcel = reader_of(layer, t, i);
        if (parcel->map < 0) continue;
        for (int part = 0; part < 2; part++) {
            usp_copy copy = usp_bundle_copy(layer, &bundle, part, layer->mesh.u, parcel->rows);
            copy.from_dtype = copy.to_dtype = dtype;
            copy.from = usp_bundle_block(layer, &bundle, memory->own, dtype, part);
            copy.to = usp_bundle_block(layer, &bundle, memory->packed + key_bytes(layer, done), dtype, part);
            copy.from_row = map_of(layer, parcel);
            usp_copies_add(layer, copy);
        }
        done += parcel->rows;
    }
}

/* Rows of keys that lie as `lying` says, with the other ring rank r, part by part. */
static void post_parts(const usp_layer *layer, const usp_tensor lying[2], int64_t rows, int r, char *there, int sends,
                       usp_messages *messages) {
    int64_t size = (int64_t)usp_dtype_size(layer->config.dtype);
    for (int i = 0; i < 2 * layer->config.batch; i++) {
        int part = i % 2, b = i / 2;
        usp_tensor from = lying[part], to = usp_parcels_block(layer, there, rows, part);
        usp_message message = {.peer = usp_layer_ring_rank(layer, r),
                               .base = at(from.data, b * from.stride_batch * size),
                               .rows = rows,
                               .bytes = (size_t)(part_row(layer, part, 1) * size),
                               .stride = (size_t)(from.stride_token * size),
                               .there = at(to.data, b * to.stride_batch * size),
                               .there_stride = (size_t)(to.stride_token * size)};
        (sends ? usp_messages_send_rows : usp_messages_recv_rows)(messages, message);
    }
}

/* Rows of own keys, from `row` on, to ring rank r. */
static void send_own(const usp_layer *layer, const usp_key_memory *memory, int64_t row, int64_t rows, int r,
                     char *there, usp_messages *messages) {
    usp_tensor lying[2] = {memory->lying[0], memory->lying[1]};
    if (!usp_parcels_go_in_parts(layer)) {
        usp_messages_send(messages, usp_layer_ring_rank(layer, r), at(memory->own, key_bytes(layer, row)),
                          key_bytes(layer, rows), there);
        return;
    }
    for (int part = 0; part < 2; part++)
        lying[part].data =
            at(lying[part].data, row * lying[part].stride_token * (int64_t)usp_dtype_size(layer->config.dtype));
    post_parts(layer, lying, rows, r, there, 1, messages);
}

/* Ring rank r's own keys. */
static void receive_own(const usp_layer *layer, char *to, int64_t rows, int r, usp_messages *messages) {
    usp_tensor lying[2];
    if (!usp_parcels_go_in_parts(layer)) {
        usp_messages_recv(messages, usp_layer_ring_rank(layer, r), to, key_bytes(layer, rows), to);
        return;
    }
    for (int part = 0; part < 2; part++) lying[part] = usp_parcels_block(layer, to, rows, part);
    post_parts(layer, lying, rows, r, to, 0, messages);
}

/* The relay ring: from neighbour to neighbour, first own keys, then what came from the other one. */
static void post_relay(const usp_layer *layer, int t, const usp_key_memory *memory, usp_messages *messages) {
    int ring = layer->mesh.ring, r = layer->mesh.r, next = (r + 1) % ring, last = (r - 1 + ring) % ring;
    int64_t leave = stage_of(layer, t - 1)->rows, arrive = stage_of(layer, t)->rows;
    if (t == 1) {
        send_own(layer, memory, 0, leave, next, memory->arriving, messages);
        receive_own(layer, memory->arriving, arrive, last, messages);
        return;
    }
    usp_messages_send(messages, usp_layer_ring_rank(layer, next), memory->before, key_bytes(layer, leave),
                      memory->arriving);
    usp_messages_recv(messages, usp_layer_ring_rank(layer, last), memory->arriving, key_bytes(layer, arrive),
                      memory->arriving);
}

void usp_parcels_post_keys(const usp_layer *layer, int t, const usp_key_memory *memory, usp_messages *messages) {
    int64_t packed = 0, done = 0;
    if (layer->plan->route.route == USP_ROUTE_RELAY) {
        post_relay(layer, t, memory, messages);
        return;
    }
    for (int64_t i = 0; i < stage_of(layer, t)->readers; i++) {
        const usp_parcel *parcel = reader_of(layer, t, i);
        char *there = at(memory->arriving, key_bytes(layer, parcel->before));
        if (parcel->map < 0) {
            send_own(layer, memory, parcel->row, parcel->rows, parcel->r, there, messages);
            continue;
        }
        usp_messages_send(messages, usp_layer_ring_rank(layer, parcel->r), at(memory->packed, key_bytes(layer, packed)),
                          key_bytes(layer, parcel->rows), there);
        packed += parcel->rows;
    }
    for (int64_t i = 0; i < stage_of(layer, t)->sources; i++) {
        const usp_parcel *parcel = source_of(layer, t, i);
        receive_own(layer, at(memory->arriving, key_bytes(layer, done)), parcel->rows, parcel->r, messages);
        done += parcel->rows;
    }
}

/* ---- gradients --------------------------------------------------------------------------------------------------- */

void usp_parcels_post_gradients(const usp_layer *layer, int t, const char *leaving, char *arriving,
                                usp_messages *messages) {
    int64_t done = 0;
    for (int64_t i = 0; i < stage_of(layer, t)->sources; i++) {
        const usp_parcel *parcel = source_of(layer, t, i);
        usp_messages_send(messages, usp_layer_ring_rank(layer, parcel->r),
                          leaving ? leaving + gradient_bytes(layer, done) : NULL, gradient_bytes(layer, parcel->rows),
                          at(arriving, gradient_bytes(layer, parcel->before)));
        done += parcel->rows;
    }
    done = 0;
    for (int64_t i = 0; i < stage_of(layer, t)->readers; i++) {
        const usp_parcel *parcel = reader_of(layer, t, i);
        char *there = at(arriving, gradient_bytes(layer, done));
        usp_messages_recv(messages, usp_layer_ring_rank(layer, parcel->r), there, gradient_bytes(layer, parcel->rows),
                          there);
        done += parcel->rows;
    }
}

usp_status usp_parcels_add(usp_layer *layer, int t, char *arrived, const usp_tensor sums[2], usp_stream stream) {
    usp_bundle bundle = usp_parcels_bundle(layer);
    int64_t done = 0;
    for (int64_t i = 0; i < stage_of(layer, t)->readers; i++) {
        const usp_parcel *parcel = reader_of(layer, t, i);
        for (int part = 0; part < 2; part++) {
            usp_copy copy = usp_bundle_copy(layer, &bundle, part, layer->mesh.u, parcel->rows);
            copy.accumulate = 1;
            copy.from = usp_bundle_block(layer, &bundle, arrived + gradient_bytes(layer, done), USP_F32, part);
            copy.to = sums[part];
            copy.to_row = map_of(layer, parcel);
            if (parcel->map < 0) copy.to.data = (float *)copy.to.data + parcel->row * copy.to.stride_token;
            usp_copies_add(layer, copy);
        }
        USP_TRY(usp_copies_run(layer, stream));
        done += parcel->rows;
    }
    return USP_OK;
}

/* ---- slices ------------------------------------------------------------------------------------------------------ */

/* Slice after slice; in each dk, then dv. */
usp_tensor usp_parcels_slice_block(const usp_layer *layer, char *block, int64_t rows, usp_slice slice, int part) {
    int64_t before = slice.number * (gradient_bytes(layer, rows) / slice.count);
    if (part) before += rows * part_row(layer, 0, slice.count) * (int64_t)sizeof(float);
    return part_block(layer, block, before, part_row(layer, part, slice.count), part);
}

void usp_parcels_post_slice(usp_layer *layer, int t, char *leaving, char *arriving, usp_slice slice) {
    const usp_parcel *source = source_of(layer, t, 0), *reader = reader_of(layer, t, 0);
    int64_t leave = gradient_bytes(layer, source->rows) / slice.count;
    int64_t arrive = gradient_bytes(layer, reader->rows) / slice.count;
    usp_messages *messages = usp_messages_begin(layer, USP_AXIS_RING);
    usp_messages_send(messages, usp_layer_ring_rank(layer, source->r), at(leaving, slice.number * leave), leave,
                      at(arriving, slice.number * leave));
    usp_messages_recv(messages, usp_layer_ring_rank(layer, reader->r), at(arriving, slice.number * arrive), arrive,
                      at(arriving, slice.number * arrive));
}

usp_status usp_parcels_add_slice(usp_layer *layer, int t, char *arrived, const usp_tensor sums[2], usp_slice slice,
                                 usp_stream stream) {
    usp_bundle bundle = usp_parcels_bundle(layer);
    const usp_parcel *parcel = reader_of(layer, t, 0);
    for (int part = 0; part < 2; part++) {
        usp_copy copy = usp_bundle_copy(layer, &bundle, part, layer->mesh.u, parcel->rows);
        copy.heads /= slice.count;
        copy.accumulate = 1;
        copy.from = usp_parcels_slice_block(layer, arrived, parcel->rows, slice, part);
        copy.to = usp_from_head(sums[part], USP_F32, slice.number * copy.heads);
        copy.to_row = map_of(layer, parcel);
        if (parcel->map < 0) copy.to.data = (float *)copy.to.data + parcel->row * copy.to.stride_token;
        usp_copies_add(layer, copy);
    }
    return usp_copies_run(layer, stream);
}
