/* replan.c - gives a sequence other documents, and plans anew what follows from them. */
#include "abi.h"
#include "error.h"
#include "plan.h"

/* A captured upload would read the plan again whenever the graph runs. */
static usp_status check_capture(usp_device *device, usp_stream stream) {
    int capturing = 0;
    USP_TRY(device->ops->capturing(device, stream, &capturing));
    USP_REQUIRE(!capturing, "stream is being captured: other documents are planned on the host, outside of graphs");
    return USP_OK;
}

static usp_status check_replan(const usp_sequence *sequence, const usp_documents *given, usp_stream stream) {
    USP_REQUIRE(sequence->replans, "the sequence was made without max_documents: its documents stay");
    USP_REQUIRE(given->count >= 1 && given->count <= sequence->documents.capacity,
                "documents is %lld: must be in 1 .. %lld", (long long)given->count,
                (long long)sequence->documents.capacity);
    USP_REQUIRE(sequence->trees || !given->parents, "parents is given: the sequence was made without");
    USP_REQUIRE(sequence->prefixes || !given->prefixes, "prefixes is given: the sequence was made without");
    USP_TRY(usp_documents_check(given, "", sequence->query.max_tokens, sequence->cross ? sequence->key.max_tokens : 0));
    return check_capture(sequence->world->device, stream);
}

/* Ranks that plan otherwise would compute wrongly: their control compares. To be refused is to be refused on all. */
static usp_status tell_plan(const usp_sequence *sequence, usp_status status) {
    usp_control *control = sequence->world->transport->control;
    uint64_t hash = status == USP_OK ? usp_documents_hash(sequence->number, &sequence->documents) : sequence->number;
    control->ops->note_plan(control, sequence->ranks, hash);
    return status;
}

static usp_status replan(usp_sequence *sequence, const usp_documents *given, usp_stream stream) {
    usp_documents documents;
    usp_status refused = usp_abi_read(&documents, sizeof documents, given, "usp_documents");
    if (refused == USP_OK) refused = check_replan(sequence, &documents, stream);
    if (refused != USP_OK) return tell_plan(sequence, refused);
    USP_TRY(usp_world_wait(sequence->world, sequence->uploads[!sequence->turn])); /* what is written now may be read */
    sequence->turn = !sequence->turn;
    usp_sequence_set_documents(sequence, &documents);
    USP_TRY(usp_world_conclude(sequence->world, usp_plan_again_all(sequence, stream)));
    return tell_plan(sequence, USP_OK);
}

usp_status usp_sequence_replan_documents(usp_sequence *sequence, const usp_documents *documents, usp_stream stream) {
    USP_REQUIRE(sequence, "sequence is NULL");
    USP_TRY(usp_guard_enter(sequence->world));
    return usp_guard_leave(sequence->world, replan(sequence, documents, stream));
}

usp_status usp_sequence_replan(usp_sequence *sequence, int64_t documents, const int64_t *ends, usp_stream stream) {
    const usp_documents given = {.struct_size = sizeof given, .count = documents, .ends = ends};
    return usp_sequence_replan_documents(sequence, &given, stream);
}
