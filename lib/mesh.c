/* mesh.c - makes meshes, chooses the lane of each axis and answers where a rank stands on it. Holds no communicator but
 * those asked for. */
#include "mesh.h"
#include "error.h"
#include "split.h"

static usp_status check_arguments(const usp_world *world, int ulysses, int ring, usp_mesh **out) {
    int size = world->transport->size;
    USP_REQUIRE(out, "mesh is NULL");
    USP_REQUIRE(ulysses >= 1, "ulysses is %d: must be at least 1", ulysses);
    USP_REQUIRE(ring >= 1, "ring is %d: must be at least 1", ring);
    USP_REQUIRE(ulysses <= size && ring <= size / ulysses && size % (ulysses * ring) == 0,
                "ulysses %d x ring %d does not divide the world's %d ranks", ulysses, ring, size);
    return USP_OK;
}

static void set_coordinates(usp_mesh *mesh, int rank) {
    mesh->ranks = mesh->ulysses * mesh->ring;
    mesh->copies = mesh->world->transport->size / mesh->ranks;
    mesh->copy = rank / mesh->ranks;
    mesh->p = rank % mesh->ranks;
    mesh->u = mesh->p % mesh->ulysses;
    mesh->r = mesh->p / mesh->ulysses;
}

/* Whether each row of the axis, of all ranks, is on one host. */
static int is_near(const usp_mesh *mesh, usp_axis axis) {
    const int *node = mesh->world->meeting.node;
    for (int rank = 0; rank < mesh->world->transport->size; rank++) {
        int u = rank % mesh->ulysses, copy = rank - rank % mesh->ranks;
        if (node[rank] != node[axis == USP_AXIS_ULYSSES ? rank - u : copy + u]) return 0;
    }
    return 1;
}

/* The same on all ranks. */
static usp_lane choose_lane(const usp_mesh *mesh, usp_axis axis) {
    usp_transport *transport = mesh->world->transport;
    return (usp_lane){transport->near && is_near(mesh, axis) ? transport->near : transport, (int)axis};
}

static void free_mesh(usp_object *object) {
    usp_mesh *mesh = (usp_mesh *)object;
    for (int axis = 0; axis < 4; axis++)
        if (mesh->axis_comm[axis]) usp_nccl_split_destroy(mesh->world->transport, mesh->axis_comm[axis]);
    usp_host_free(&mesh->world->host, mesh);
}

static usp_status create(usp_world *world, int ulysses, int ring, usp_mesh **out) {
    static const usp_field fields[] = {{"ulysses", 0, sizeof(int)}, {"ring", sizeof(int), sizeof(int)}};
    void *memory = NULL;
    usp_status status = check_arguments(world, ulysses, ring, out);
    if (status == USP_OK) status = usp_host_alloc(&world->host, sizeof(usp_mesh), "mesh", &memory);
    int record[2] = {ulysses, ring};
    status = usp_world_agree(world, status, &(usp_agreement){"mesh", 0, record, sizeof record, fields, 2, 0});
    if (status != USP_OK) {
        usp_host_free(&world->host, memory);
        return status;
    }
    usp_mesh *mesh = memory;
    *mesh = (usp_mesh){.world = world, .ulysses = ulysses, .ring = ring};
    set_coordinates(mesh, world->transport->rank);
    for (int axis = 0; axis < USP_LANES; axis++) mesh->lane[axis] = choose_lane(mesh, (usp_axis)axis);
    usp_object_begin(&mesh->object, world, &world->object, free_mesh);
    *out = mesh;
    return USP_OK;
}

usp_status usp_mesh_create(usp_world *world, int ulysses, int ring, usp_mesh **out) {
    USP_REQUIRE(world, "world is NULL");
    USP_TRY(usp_guard_enter(world));
    return usp_guard_leave(world, create(world, ulysses, ring, out));
}

usp_status usp_mesh_axis(const usp_mesh *mesh, usp_axis axis, int *rank, int *size) {
    USP_REQUIRE(mesh, "mesh is NULL");
    USP_TRY(usp_guard_process(mesh->world));
    USP_REQUIRE(axis >= USP_AXIS_ULYSSES && axis <= USP_AXIS_DATA, "axis is %d: no such axis", (int)axis);
    const int ranks[] = {mesh->u, mesh->r, mesh->p, mesh->copy};
    const int sizes[] = {mesh->ulysses, mesh->ring, mesh->ranks, mesh->copies};
    if (rank) *rank = ranks[axis];
    if (size) *size = sizes[axis];
    return USP_OK;
}

/* Ranks with the same colour share a row of the axis: all coordinates but the axis' own are equal. */
static int axis_colour(const usp_mesh *mesh, usp_axis axis) {
    const int colours[] = {mesh->copy * mesh->ring + mesh->r, mesh->copy * mesh->ulysses + mesh->u, mesh->copy,
                           mesh->p};
    return colours[axis];
}

/* Ranks split one communicator together: for the same axis of the same mesh, and none has it already. */
static usp_status agree_on_axis(usp_mesh *mesh, usp_axis axis, usp_status mine) {
    static const usp_field fields[] = {{"axis", 0, sizeof(int)},
                                       {"ulysses", sizeof(int), sizeof(int)},
                                       {"ring", 2 * sizeof(int), sizeof(int)},
                                       {"mesh", 3 * sizeof(int), sizeof(int)}};
    int made = mine == USP_OK && mesh->axis_comm[axis];
    int record[4] = {(int)axis, mesh->ulysses, mesh->ring, made};
    return usp_world_agree(mesh->world, mine, &(usp_agreement){"axis", 0, record, sizeof record, fields, 4, 0});
}

static usp_status axis_comm(usp_mesh *mesh, usp_axis axis, struct ncclComm **comm) {
    int rank = 0;
    usp_status mine = comm ? usp_mesh_axis(mesh, axis, &rank, NULL) : usp_fail(USP_INVALID, "comm is NULL");
    USP_TRY(agree_on_axis(mesh, axis, mine));
    if (!mesh->axis_comm[axis]) {
        USP_TRY(usp_nccl_split(mesh->world->transport, axis_colour(mesh, axis), rank, &mesh->axis_comm[axis]));
    }
    *comm = mesh->axis_comm[axis];
    return USP_OK;
}

usp_status usp_mesh_axis_comm(usp_mesh *mesh, usp_axis axis, struct ncclComm **comm) {
    USP_REQUIRE(mesh, "mesh is NULL");
    USP_TRY(usp_guard_enter(mesh->world));
    return usp_guard_leave(mesh->world, axis_comm(mesh, axis, comm));
}

void usp_mesh_destroy(usp_mesh *mesh) {
    if (mesh) usp_object_drop(&mesh->object);
}
