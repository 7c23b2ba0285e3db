/* schedule.h - in which order the warps of an emulated block run. A hand-over that nobody waits for goes well as long
 * as both sides keep step: a schedule holds some warps back, or lets them run ahead, as far as barriers allow. */
#ifndef USP_TESTS_EMULATED_SCHEDULE_H
#define USP_TESTS_EMULATED_SCHEDULE_H
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct usp_schedule {
    const char *name;
    uint32_t first, last; /* a bit a warp: those that run whenever they can, and those that run when nothing else can go
                             on, no copy either; the others run by turns */
    uint32_t last_lanes;  /* a bit a lane: of every warp, those that run last */
    int at_once;          /* 1: copies and products happen when they are started, not as late as they may */
    int drawn;            /* 1: all of this is drawn anew now and then */
    int spread;           /* 1: blocks leave jobs, drawn too, to those that run after them; 0: the first does all */
    int late;             /* 1: copies happen when nothing else can go on alone, the last one that was started first */
} usp_schedule;

/* For the blocks of all launches from now on. At the begin all warps run by turns. */
void usp_emulated_schedule(const usp_schedule *schedule, uint64_t seed);

/* 1: blocks wait for those that were dealt jobs before them, and leave none, whatever the schedule says. */
void usp_emulated_in_order(int yes);

#ifdef __cplusplus
}
#endif
#endif
