/* job.c - a rank of a small job: makes a world as its launcher says, and looks who is in it. usage: job NUMBER SIZE
 * Every rank of a job is given the same number. 0: all are there and nobody else is; 1: no world; 3: another job is in
 * it; 4: it has another size. */
#include "world.h"
#include <stdio.h>
#include <stdlib.h>

enum { USP_MOST = 64, USP_LIMIT_MS = 30000 };

static int usp_look(usp_world *world, int number, int size) {
    usp_world_info info = {.struct_size = sizeof info};
    int all[USP_MOST];
    if (usp_world_get_info(world, &info) != USP_OK || info.size != size || size > USP_MOST) return 4;
    if (usp_transport_allgather(world->transport, &number, all, sizeof number) != USP_OK) return 1;
    for (int i = 0; i < size; i++)
        if (all[i] != number) return 3;
    return 0;
}

int main(int argc, char **argv) {
    usp_world_config config = {.struct_size = sizeof config, .device = USP_DEVICE_CPU, .timeout_ms = USP_LIMIT_MS};
    usp_world *world;
    int number = argc == 3 ? atoi(argv[1]) : 0, size = argc == 3 ? atoi(argv[2]) : 0;
    int wrong = usp_world_create_env(&config, &world) != USP_OK;
    if (!wrong) wrong = usp_look(world, number, size);
    if (wrong) fprintf(stderr, "job %d of %d: status %d, %s\n", number, size, wrong, usp_last_error());
    if (wrong != 1) usp_world_destroy(world);
    return wrong;
}
