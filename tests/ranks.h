/* ranks.h - runs one body on every rank of a new world: threads on the CPU, threads that share a GPU, a thread a GPU
 * over NCCL, or this process as one of many. Collects what the ranks say, within a time limit; knows no layer. */
#ifndef USP_TESTS_RANKS_H
#define USP_TESTS_RANKS_H
#include "heap.h"

typedef struct usp_run usp_run;

/* What a body gets. */
typedef struct usp_rank {
    usp_world *world;
    usp_stream stream;
    usp_device_kind device;
    int rank, size;
    usp_heap *heap; /* the library's host memory on this rank */
    usp_run *run;
} usp_rank;

/* 0: fine, though the rank may have said something. Else the body could not go on and the world is aborted. */
typedef int (*usp_body)(usp_rank *rank, void *argument);

typedef enum usp_ranks_kind {
    USP_RANKS_THREADS = 0, /* usp_world_create_threads; on CUDA all share GPU 0 */
    USP_RANKS_NCCL = 1,    /* usp_world_create_nccl_id, a thread a GPU */
    USP_RANKS_PROCESS = 2  /* this process is one rank: `create`, or usp_world_create_env */
} usp_ranks_kind;

typedef struct usp_ranks {
    usp_ranks_kind kind;
    usp_device_kind device; /* auto: CPU */
    int size;               /* the environment's knows better */
    int stack;              /* KiB of each rank's stack; 0: the system's */
    int seconds;            /* time limit; 0: 60; four times as many under a thread sanitizer */
    int watchdog;           /* as in usp_world_config */
    usp_transport_kind transport;
    int host;       /* ranks that pass for those of one host, by usp_world_config.node; 0: all as they are */
    int timeout_ms; /* as in usp_world_config; 0: half of the time limit */
    usp_status (*create)(const usp_world_config *, usp_world **); /* processes; NULL: from the environment */
    usp_status (*stream_create)(usp_stream *);                    /* NULL: the NULL stream */
    void (*stream_destroy)(usp_stream);
} usp_ranks;

/* What the ranks said, first things first, cut to fit. */
typedef struct usp_report {
    int failures; /* sentences said */
    int done;     /* things that ran to the end, counted by usp_count */
    int refused;  /* things refused with a reason, counted by usp_refuse */
    char text[4096];
} usp_report;

/* Runs the body on all ranks and waits. 0 if nobody said anything; a world that leaves host memory behind is a failure.
 */
int usp_ranks_run(const usp_ranks *ranks, usp_body body, void *argument, usp_report *report);

/* Records a failure; always 1. */
int usp_say(usp_rank *rank, const char *format, ...) __attribute__((format(printf, 2, 3)));
void usp_count(usp_rank *rank);
void usp_refuse(usp_rank *rank, const char *format, ...) __attribute__((format(printf, 2, 3)));

#endif
