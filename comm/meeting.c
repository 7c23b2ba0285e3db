/* meeting.c - where the ranks of a new world meet: once, over whatever all-gather the way to make the world has. It
 * builds nothing. */
#define _GNU_SOURCE
#include "meeting.h"
#include "error.h"
#include "text.h"
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

typedef struct usp_term {
    const char *name;
    size_t offset;
} usp_term;

static const usp_term terms[] = {
    {"version", offsetof(usp_terms, version)},       {"device", offsetof(usp_terms, device)},
    {"timeout_ms", offsetof(usp_terms, timeout_ms)}, {"silence_ms", offsetof(usp_terms, silence_ms)},
    {"transport", offsetof(usp_terms, transport)},   {"NCCL version", offsetof(usp_terms, transport_version)}};

static int32_t term_of(const usp_card *card, const usp_term *term) {
    int32_t value;
    memcpy(&value, (const char *)&card->terms + term->offset, sizeof value);
    return value;
}

static usp_status compare(const usp_card *all, int rank) {
    for (size_t i = 0; i < sizeof terms / sizeof *terms; i++) {
        int ours = term_of(&all[0], &terms[i]), theirs = term_of(&all[rank], &terms[i]);
        if (ours != theirs)
            return usp_fail(USP_MISMATCH, "world.%s differs between rank 0 and rank %d: %d and %d", terms[i].name, rank,
                            ours, theirs);
    }
    return USP_OK;
}

/* Failures first: a rank that failed may not have read its terms. */
static usp_status judge(const usp_card *all, int size) {
    for (int rank = 0; rank < size; rank++)
        if (all[rank].status != USP_OK)
            return usp_fail(USP_PEER_FAILED, "rank %d could not join: %s", rank, all[rank].sentence);
    for (int rank = 1; rank < size; rank++) USP_TRY(compare(all, rank));
    return USP_OK;
}

usp_status usp_meeting_note(usp_meeting *meeting, usp_status status) {
    usp_card *mine = &meeting->mine;
    if (mine->status == USP_OK && status != USP_OK) {
        mine->status = (int32_t)status;
        snprintf(mine->sentence, sizeof mine->sentence, "%s", usp_last_error());
    }
    return mine->status == USP_OK ? USP_OK : usp_fail((usp_status)mine->status, "%s", mine->sentence);
}

static size_t bytes_of(const usp_meeting *meeting) {
    return (sizeof(usp_card) + sizeof(int)) * (size_t)meeting->bootstrap.size;
}

/* Not by the caller's allocator: a rank that has no memory must be able to say so. */
static usp_status map_cards(usp_meeting *meeting) {
    size_t bytes = bytes_of(meeting);
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return usp_fail(USP_NO_MEMORY, "cannot map %zu bytes for a meeting", bytes);
    meeting->all = memory;
    meeting->node = (int *)(void *)(meeting->all + meeting->bootstrap.size);
    return USP_OK;
}

static void find_nodes(usp_meeting *meeting) {
    for (int rank = 0; rank < meeting->bootstrap.size; rank++) {
        int first = 0;
        while (meeting->all[first].node != meeting->all[rank].node) first++;
        meeting->node[rank] = first;
    }
}

usp_status usp_meet(usp_meeting *meeting) {
    const usp_bootstrap *bootstrap = &meeting->bootstrap;
    USP_TRY(map_cards(meeting));
    usp_status status = bootstrap->gather(bootstrap->user, &meeting->mine, meeting->all, sizeof(usp_card));
    USP_TRY(usp_meeting_note(meeting, USP_OK));
    for (int i = 0; i < bootstrap->size; i++) usp_text_clean(meeting->all[i].sentence, sizeof meeting->all[i].sentence);
    if (status == USP_OK) find_nodes(meeting);
    return status == USP_OK ? judge(meeting->all, bootstrap->size) : status;
}

void usp_meeting_end(usp_meeting *meeting) {
    if (meeting->all) munmap(meeting->all, bytes_of(meeting));
    meeting->all = NULL;
}
