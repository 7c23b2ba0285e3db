/* plans.h - what a rank's sequences have been re-planned to, and what memory calls got that promised it alike, as one
 * running hash, so that ranks can compare. */
#ifndef USP_PLANS_H
#define USP_PLANS_H
#include <stdint.h>

enum { USP_PLAN_SIZES = 16, USP_PLAN_HISTORY = 256 };

/* Of all sequences over `ranks` ranks: hash[count % USP_PLAN_HISTORY] covers the first `count` notes. */
typedef struct usp_replans {
    int ranks; /* 0: unused */
    uint64_t count, hash[USP_PLAN_HISTORY];
} usp_replans;

/* For each number of ranks that sequences have; those of more than USP_PLAN_SIZES different numbers are not kept. */
typedef struct usp_replans_list {
    usp_replans of[USP_PLAN_SIZES];
} usp_replans_list;

void usp_plans_note(usp_replans_list *plans, int ranks, uint64_t hash);
/* Whether `peer`, whose sequences over `ranks` ranks had this hash after `count` notes, differs from `rank`, whose
 * plans these are. Other data copies may, and what this rank has yet to plan, or forgot, is not known. */
int usp_plans_differ(const usp_replans_list *plans, int rank, int peer, int ranks, uint64_t count, uint64_t hash);

#endif
