/* replans.h - what must hold of sequences that are given other documents: the layers on them are as if made anew, and a
 * re-plan that is refused changes nothing. Bodies for usp_ranks_run. */
#ifndef USP_TESTS_REPLANS_H
#define USP_TESTS_REPLANS_H
#include "stage.h"

/* The documents of a case, whose arrays are in the list. */
usp_documents usp_documents_of(const usp_case *c, usp_case_document_list *list);
/* Gives an open stage's sequence other documents, and where they move tokens that of its keys. */
usp_status usp_replan_stage(usp_stage *stage, const usp_documents *documents);
/* Runs an open stage that holds no tensors on fresh ones, for as many tokens as its sequence has now. 0, or 1 after
 * saying why. */
int usp_run_planned(const usp_stage *planned, usp_whole *whole);

/* Re-planned = created anew, bit for bit: documents, prefixes, trees, keys of another length, softmax and linear, on
 * every layout. argument: none. */
int usp_body_replanned(usp_rank *rank, void *argument);
/* Documents that make no sense are refused by name, and the results afterwards are those of before. argument: none. */
int usp_body_refused_replans(usp_rank *rank, void *argument);
/* One rank's documents make no sense and are refused there: no rank computes with what the others have. Ends the world,
 * of two ranks, so that none hears of it too early. argument: none. */
int usp_body_refused_alone(usp_rank *rank, void *argument);
/* Two ranks re-plan to different documents by which each owns as many tokens: told, and by that reason, wherever their
 * tokens lie. Ends the world. argument: none. */
int usp_body_planned_apart(usp_rank *rank, void *argument);
/* Two ranks that have promised like memory, of which one gives no saved: told. Ends the world. argument: none. */
int usp_body_memory_apart(usp_rank *rank, void *argument);

#endif
