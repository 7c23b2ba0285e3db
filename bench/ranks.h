/* ranks.h - starts the ranks of a tool: threads, a thread a GPU, or this process of a launcher's job.
 * A tool writes one function that every rank runs; failures come back as one sentence. */
#ifndef USP_RANKS_H
#define USP_RANKS_H
#include "tool.h"

typedef struct usp_ranks_config {
    usp_device_kind device;
    int threads;    /* thread-ranks, on the CPU or on one GPU; 0: not asked for */
    int gpus;       /* a thread-rank a GPU, over NCCL; 0: not asked for. Neither: the launcher's job, else ... */
    int otherwise;  /* ... so many thread-ranks; 0: one */
    int timeout_ms; /* as in usp_world_config */
    usp_transport_kind transport;
} usp_ranks_config;

/* What a rank's function works with. */
typedef struct usp_rank {
    usp_world *world;
    usp_mesh *mesh;         /* 1 x size, for `everyone` */
    usp_sequence *everyone; /* one token a rank: usp_rank_gather */
    int rank, size;
    usp_device_kind device;
    char transport[16];
    usp_stream stream; /* this thread's own */
    usp_tool_error error;
} usp_rank;

typedef usp_status (*usp_rank_main)(usp_rank *rank, void *user);

/* Runs `run` on every rank of this process; the first real failure of any of them, with its sentence. */
usp_status usp_ranks_run(const usp_ranks_config *config, usp_rank_main run, void *user, usp_tool_error *error);

/* A world of one rank beside the others, on this thread's device. close is fine with what open left after a failure. */
usp_status usp_rank_open_single(usp_rank *single, usp_rendezvous **rendezvous, const usp_rank *beside);
void usp_rank_close_single(usp_rank *single, usp_rendezvous *rendezvous);

/* Collective. `bytes` of host memory from every rank, in rank order. Also the barrier. */
usp_status usp_rank_gather(usp_rank *rank, const void *mine, void *all, size_t bytes);
/* Collective. OK if `mine` is on all ranks; else `mine`, or PEER_FAILED with a sentence that names a rank. */
usp_status usp_rank_agree(usp_rank *rank, usp_status mine);
/* Collective. The largest of all ranks' values. */
usp_status usp_rank_max(usp_rank *rank, double mine, double *max);

#endif
