/* plans.c - what a rank's sequences have been re-planned to, as one running hash, so that ranks can compare. */
#include "plans.h"
#include "hash.h"

/* The place of sequences over `ranks` ranks, perhaps a free one; USP_PLAN_SIZES: there is none. */
static int place_of(const usp_replans_list *plans, int ranks) {
    int i = 0;
    while (i < USP_PLAN_SIZES && plans->of[i].ranks != ranks && plans->of[i].ranks != 0) i++;
    return i;
}

void usp_plans_note(usp_replans_list *plans, int ranks, uint64_t hash) {
    int place = place_of(plans, ranks);
    if (place == USP_PLAN_SIZES) return;
    usp_replans *plan = &plans->of[place];
    uint64_t before = plan->hash[plan->count % USP_PLAN_HISTORY];
    plan->ranks = ranks;
    plan->hash[++plan->count % USP_PLAN_HISTORY] = usp_hash(before, &hash, sizeof hash);
}

int usp_plans_differ(const usp_replans_list *plans, int rank, int peer, int ranks, uint64_t count, uint64_t hash) {
    int place = ranks > 0 && rank / ranks == peer / ranks ? place_of(plans, ranks) : USP_PLAN_SIZES;
    if (place == USP_PLAN_SIZES) return 0;
    const usp_replans *plan = &plans->of[place];
    if (count > plan->count || plan->count - count >= USP_PLAN_HISTORY) return 0;
    return plan->hash[count % USP_PLAN_HISTORY] != hash;
}
