/* memory.c - memory of a world's device for its caller: its own, and what the transport shares with all ranks. */
#include "error.h"
#include "world.h"

/* ---- memory ------------------------------------------------------------------------------------------------------ */

usp_status usp_world_alloc(usp_world *world, size_t bytes, void **memory) {
    USP_REQUIRE(world, "world is NULL");
    USP_REQUIRE(memory, "memory is NULL");
    USP_TRY(usp_guard_process(world));
    return world->device->ops->alloc(world->device, bytes, memory);
}

void usp_world_free(usp_world *world, void *memory) {
    if (world && memory && usp_guard_process(world) == USP_OK) world->device->ops->free(world->device, memory);
}

usp_status usp_world_copy(usp_world *world, void *to, const void *from, size_t bytes, usp_stream stream) {
    USP_REQUIRE(world, "world is NULL");
    USP_REQUIRE(bytes == 0 || (to && from), "to or from is NULL");
    USP_TRY(usp_guard_process(world));
    return world->device->ops->copy(world->device, to, from, bytes, stream);
}

/* ---- shared memory ----------------------------------------------------------------------------------------------- */

static void *keep_piece(usp_world *world, usp_piece *piece, void *memory, size_t bytes) {
    *piece = (usp_piece){world->pieces, memory, bytes, ++world->piece_count};
    world->pieces = piece;
    return memory;
}

usp_place usp_world_find_place(const usp_world *world, const void *memory, size_t bytes) {
    for (const usp_piece *piece = world->pieces; piece; piece = piece->next) {
        size_t offset = (size_t)((uintptr_t)memory - (uintptr_t)piece->memory);
        if (offset <= piece->bytes && bytes <= piece->bytes - offset) return (usp_place){piece->number, offset};
    }
    return (usp_place){0, 0};
}

/* The transport that gives shared memory: where ranks reach each other's, that one. */
static usp_transport *sharer_of(const usp_world *world) {
    return world->transport->near ? world->transport->near : world->transport;
}

static usp_status alloc_shared(usp_world *world, size_t bytes, void **memory) {
    usp_transport *transport = sharer_of(world);
    void *entry = NULL, *taken = NULL;
    int64_t most;
    USP_TRY(usp_world_largest(world, "shared memory", bytes < INT64_MAX ? (int64_t)bytes : INT64_MAX, &most));
    usp_status status = memory ? USP_OK : usp_fail(USP_INVALID, "memory is NULL");
    if (status == USP_OK && most == INT64_MAX)
        status = usp_fail(USP_NO_MEMORY, "cannot allocate %lld bytes of shared memory or more", (long long)most);
    if (status == USP_OK) status = usp_host_alloc(&world->host, sizeof(usp_piece), "shared memory", &entry);
    if (status == USP_OK) status = transport->ops->alloc_shared(transport, (size_t)most, &taken);
    status = usp_world_agree(world, status, &(usp_agreement){.what = "shared memory"});
    if (status == USP_OK) status = transport->ops->register_shared(transport, taken);
    if (status != USP_OK) {
        if (taken) transport->ops->free_shared(transport, taken);
        usp_host_free(&world->host, entry);
        return status;
    }
    *memory = keep_piece(world, entry, taken, (size_t)most);
    return USP_OK;
}

usp_status usp_world_alloc_shared(usp_world *world, size_t bytes, void **memory) {
    USP_REQUIRE(world, "world is NULL");
    USP_TRY(usp_guard_enter(world));
    return usp_guard_leave(world, alloc_shared(world, bytes, memory));
}

/* All ranks give the same piece back, or none does. */
static usp_status agree_to_free(usp_world *world, const usp_piece *piece) {
    static const usp_field fields[] = {{"piece", 0, sizeof(uint64_t)}};
    uint64_t record = piece ? piece->number : 0;
    usp_status mine = piece ? USP_OK : usp_fail(USP_INVALID, "the memory is no shared memory of this world");
    return usp_world_agree(world, mine, &(usp_agreement){"freed memory", 0, &record, sizeof record, fields, 1, 0});
}

/* In a world that has failed each rank gives its own back. */
static usp_status free_shared(usp_world *world, void *memory) {
    usp_transport *transport = sharer_of(world);
    usp_piece **link = &world->pieces;
    while (*link && (*link)->memory != memory) link = &(*link)->next;
    usp_piece *piece = *link;
    usp_status status = agree_to_free(world, piece);
    if (!piece || (status != USP_OK && usp_transport_poll(transport) == USP_OK)) return status;
    *link = piece->next;
    usp_host_free(&world->host, piece);
    usp_status freed = transport->ops->free_shared(transport, memory);
    return status != USP_OK ? status : freed;
}

usp_status usp_world_free_shared(usp_world *world, void *memory) {
    USP_REQUIRE(world, "world is NULL");
    USP_TRY(usp_guard_enter(world));
    return usp_guard_leave(world, free_shared(world, memory));
}
