/* mesh.h - a ulysses x ring grid over the consecutive ranks of a world, with data copies beside it. */
#ifndef USP_MESH_H
#define USP_MESH_H
#include "world.h"

struct usp_mesh {
    usp_object object;
    usp_world *world;
    int ulysses, ring, ranks, copies; /* degrees U, R; N = U * R; data copies */
    int u, r, p, copy;                /* this rank: p = r * U + u */
    usp_lane lane[USP_LANES];         /* of the ulysses and of the ring axis, by usp_axis */
    struct ncclComm *axis_comm[4];    /* by usp_axis, made on request */
};

/* World rank of ulysses rank u and ring rank r of this data copy. */
static inline int usp_mesh_rank(const usp_mesh *mesh, int u, int r) {
    return mesh->copy * mesh->ranks + r * mesh->ulysses + u;
}

#endif
