/* planned.c - opens a world of one rank, and a plan on it. */
#include "planned.h"
#include "error.h"

usp_status usp_planned_open(usp_planned *p, usp_device_kind device, usp_attention attention, usp_mask mask,
                            int64_t queries, int64_t keys) {
    usp_world_config world = {.struct_size = sizeof world, .device = device};
    usp_sequence_config sequence = {.struct_size = sizeof sequence,
                                    .layout = USP_LAYOUT_CONTIGUOUS,
                                    .tokens = queries,
                                    .key_tokens = keys == queries ? 0 : keys};
    usp_shape shape = {.grid = {1, 1, 0, 0}, .attention = attention, .rule = usp_rule_of(mask, 0, 0, 0)};
    *p = (usp_planned){0};
    USP_TRY(usp_rendezvous_create(1, &p->rendezvous));
    USP_TRY(usp_world_create_threads(&world, p->rendezvous, 0, &p->world));
    USP_TRY(usp_mesh_create(p->world, 1, 1, &p->mesh));
    USP_TRY(usp_sequence_create(p->mesh, &sequence, &p->sequence));
    return usp_plan_acquire(p->sequence, &shape, &p->plan);
}

void usp_planned_close(usp_planned *p) {
    if (p->plan) usp_plan_release(p->sequence, p->plan);
    usp_sequence_destroy(p->sequence);
    usp_mesh_destroy(p->mesh);
    usp_world_destroy(p->world);
    usp_rendezvous_destroy(p->rendezvous);
}
