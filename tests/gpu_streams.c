/* gpu_streams.c - what CUDA graphs and streams must leave as it is: a layer's results, captured and replayed, beside
 * other layers, in any mix of calls. */
#define _DEFAULT_SOURCE
#include "gpu_streams.h"

#include <cuda_runtime_api.h>
#include <unistd.h>

enum { REPLAYS = 1000, STREAMS = 3 };

usp_status usp_gpu_stream_create(usp_stream *stream) {
    return cudaStreamCreateWithFlags(stream, cudaStreamNonBlocking) == cudaSuccess ? USP_OK : USP_DEVICE;
}

void usp_gpu_stream_destroy(usp_stream stream) {
    cudaStreamDestroy(stream);
}

/* ---- graphs ------------------------------------------------------------------------------------------------------ */

/* Forward and backward of a stage as one graph. NULL after saying why. */
static cudaGraphExec_t capture(usp_stage *stage) {
    cudaGraph_t graph = NULL;
    cudaGraphExec_t instance = NULL;
    cudaStreamBeginCapture(stage->rank->stream, cudaStreamCaptureModeThreadLocal);
    int failed = usp_stage_forward(stage, 1) || usp_stage_backward(stage);
    cudaError_t ended = cudaStreamEndCapture(stage->rank->stream, &graph);
    if (!failed && ended == cudaSuccess) ended = cudaGraphInstantiate(&instance, graph, 0);
    if (graph) cudaGraphDestroy(graph);
    if (!failed && ended != cudaSuccess) usp_say(stage->rank, "capture: %s", cudaGetErrorString(ended));
    return failed ? NULL : instance;
}

static int replay(usp_stage *stage, usp_whole *whole) {
    cudaGraphExec_t instance = capture(stage);
    if (!instance) return 1;
    cudaError_t launched = cudaSuccess;
    for (int i = 0; i < REPLAYS && launched == cudaSuccess; i++)
        launched = cudaGraphLaunch(instance, stage->rank->stream);
    if (launched != cudaSuccess) return usp_say(stage->rank, "launch: %s", cudaGetErrorString(launched));
    int failed = usp_stage_gather(stage, 1, whole);
    cudaGraphExecDestroy(instance);
    return failed;
}

/* A layer of each kind, for graphs and streams. */
static const usp_case pair[] = {{.tokens = 517,
                                 .mask = USP_MASK_CAUSAL,
                                 .dtype = USP_BF16,
                                 .heads = 4,
                                 .kv_heads = 2,
                                 .head_dim = 64,
                                 .return_lse = 1,
                                 .deterministic = 1},
                                {.attention = USP_LINEAR,
                                 .tokens = 517,
                                 .mask = USP_MASK_CAUSAL,
                                 .dtype = USP_BF16,
                                 .heads = 4,
                                 .head_dim = 64,
                                 .decay = 1,
                                 .scale = 0.1f,
                                 .final_state = 1,
                                 .deterministic = 1}};

/* One of the pair on both axes where the size allows. */
static int open_pair(usp_rank *rank, int which, usp_stage *stage) {
    usp_case c = pair[which];
    c.ulysses = rank->size % 2 == 0 ? 2 : 1;
    c.ring = rank->size / c.ulysses;
    if (usp_stage_open(rank, &c, stage) != USP_OK) return usp_say(rank, "%s", usp_last_error());
    return usp_stage_fill(stage);
}

/* Results of a replayed graph, on memory poisoned since, are those of the calls themselves. */
static int graphs(usp_rank *rank) {
    for (int i = 0; i < 2; i++) {
        usp_stage stage;
        usp_whole eager, replayed;
        if (open_pair(rank, i, &stage) || usp_stage_forward(&stage, 1) || usp_stage_backward(&stage)) return 1;
        if (usp_stage_gather(&stage, 1, &eager) || usp_stage_clear(&stage) || replay(&stage, &replayed)) return 1;
        if (rank->rank == 0) usp_compare_bits(rank, &stage.c, "a replayed graph", USP_SAME_ALL, &replayed, &eager);
        usp_whole_free(&eager);
        usp_whole_free(&replayed);
        usp_stage_close(&stage);
        usp_count(rank);
    }
    return 0;
}

/* Gives the sequence documents of a pattern. */
static int replan(usp_stage *stage, int pattern) {
    usp_case_document_list list;
    usp_case changed = stage->c;
    changed.documents = pattern;
    usp_case_documents(&changed, &list);
    if (usp_sequence_replan(stage->sequence, list.count, list.ends, stage->rank->stream) == USP_OK) return 0;
    return usp_say(stage->rank, "replan: %s", usp_last_error());
}

/* The graph replayed with the documents of a pattern gives what the calls themselves give. */
static int compare_replanned(usp_stage *stage, cudaGraphExec_t instance, int pattern) {
    usp_whole eager, replayed;
    if (replan(stage, pattern) || usp_stage_clear(stage)) return 1;
    if (cudaGraphLaunch(instance, stage->rank->stream) != cudaSuccess) return usp_say(stage->rank, "no launch");
    if (usp_stage_gather(stage, 1, &replayed) || usp_stage_clear(stage)) return 1;
    if (usp_stage_forward(stage, 1) || usp_stage_backward(stage) || usp_stage_gather(stage, 1, &eager)) return 1;
    if (stage->rank->rank == 0)
        usp_compare_bits(stage->rank, &stage->c, "a graph replayed with other documents", USP_SAME_ALL, &replayed,
                         &eager);
    usp_whole_free(&eager);
    usp_whole_free(&replayed);
    return 0;
}

/* Captured once, with one document; replayed with documents of all patterns. */
static int replanned_graphs(usp_rank *rank) {
    for (int i = 0; i < 2; i++) {
        usp_stage stage;
        usp_case c = pair[i];
        c.ulysses = rank->size % 2 == 0 ? 2 : 1;
        c.ring = rank->size / c.ulysses;
        c.max_documents = USP_CASE_DOCUMENTS;
        if (usp_stage_open(rank, &c, &stage) != USP_OK) return usp_say(rank, "%s", usp_last_error());
        if (usp_stage_fill(&stage) || usp_stage_forward(&stage, 1) || usp_stage_backward(&stage)) return 1;
        cudaGraphExec_t instance = capture(&stage);
        int failed = instance == NULL;
        for (int pattern = 1; pattern <= 5 && !failed; pattern++) failed = compare_replanned(&stage, instance, pattern);
        if (instance) cudaGraphExecDestroy(instance);
        if (failed) return 1;
        usp_stage_close(&stage);
        usp_count(rank);
    }
    return 0;
}

int usp_body_graphs(usp_rank *rank, void *argument) {
    (void)argument;
    return graphs(rank) || replanned_graphs(rank);
}

/* ---- streams ----------------------------------------------------------------------------------------------------- */

/* Both layers of the pair, each on a stream of its own, with nothing between the calls that waits. */
static int run_side_by_side(usp_stage *one, usp_stage *other, usp_stream second) {
    usp_rank *rank = one->rank;
    usp_stream first = rank->stream;
    int failed = usp_stage_forward(one, 1);
    rank->stream = second;
    failed = failed || usp_stage_forward(other, 1);
    rank->stream = first;
    failed = failed || usp_stage_backward(one);
    rank->stream = second;
    failed = failed || usp_stage_backward(other);
    rank->stream = first;
    return failed || usp_world_synchronize(rank->world, second) != USP_OK;
}

static int compare_side_by_side(usp_rank *rank, usp_stage *stage, usp_stage *other, usp_stream second) {
    usp_whole serial, concurrent;
    if (usp_stage_forward(stage, 1) || usp_stage_backward(stage) || usp_stage_gather(stage, 1, &serial)) return 1;
    if (usp_stage_clear(stage) || run_side_by_side(stage, other, second)) return 1;
    if (usp_stage_gather(stage, 1, &concurrent)) return 1;
    if (rank->rank == 0) usp_compare_bits(rank, &stage->c, "beside another layer", USP_SAME_ALL, &concurrent, &serial);
    usp_whole_free(&serial);
    usp_whole_free(&concurrent);
    return 0;
}

/* A layer gives the same bits alone and beside another one on another stream. */
static int streams(usp_rank *rank) {
    usp_stage stage[2];
    usp_stream second = NULL;
    if (usp_gpu_stream_create(&second) != USP_OK) return usp_say(rank, "no second stream");
    if (open_pair(rank, 0, &stage[0]) || open_pair(rank, 1, &stage[1])) return 1;
    for (int i = 0; i < 2; i++)
        if (compare_side_by_side(rank, &stage[i], &stage[1 - i], second)) return 1;
    usp_stage_close(&stage[1]);
    usp_stage_close(&stage[0]);
    usp_gpu_stream_destroy(second);
    usp_count(rank);
    return 0;
}

int usp_body_streams(usp_rank *rank, void *argument) {
    (void)argument;
    return streams(rank);
}

/* ---- interleavings ----------------------------------------------------------------------------------------------- */

/* Layers on whatever streams, without a wait of the host: the same draws on all ranks, which are late by turns. */
typedef struct usp_mix {
    usp_rank *rank;
    usp_stage stage[2];
    usp_stream stream[STREAMS];
    cudaEvent_t done[2]; /* of each stage's last call */
    unsigned draw;
} usp_mix;

static unsigned next_draw(usp_mix *mix) {
    mix->draw = mix->draw * 1664525u + 1013904223u;
    return mix->draw >> 8;
}

/* A stage has one workspace, so that its calls follow each other; all else is free. */
static int call_one(usp_mix *mix) {
    unsigned draw = next_draw(mix), which = draw % 2;
    usp_stream own = mix->rank->stream;
    usp_stage *stage = &mix->stage[which];
    mix->rank->stream = mix->stream[draw / 2 % STREAMS];
    if (draw / 64 % 64 == (unsigned)mix->rank->rank) usleep(draw / 4096 % 300);
    cudaStreamWaitEvent(mix->rank->stream, mix->done[which], 0);
    int failed = draw / 16 % 4 ? usp_stage_forward(stage, 1) : usp_stage_backward(stage);
    cudaEventRecord(mix->done[which], mix->rank->stream);
    mix->rank->stream = own;
    return failed;
}

static int compare_mixed(usp_mix *mix, int which, const usp_whole *alone) {
    usp_whole after;
    if (usp_stage_gather(&mix->stage[which], 1, &after)) return 1;
    if (mix->rank->rank == 0)
        usp_compare_bits(mix->rank, &mix->stage[which].c, "in a mix of calls and streams", USP_SAME_ALL, &after, alone);
    usp_whole_free(&after);
    return 0;
}

static int run_mix(usp_mix *mix, int calls) {
    usp_whole alone[2];
    int failed = 0;
    for (int i = 0; i < 2; i++) {
        usp_stage *stage = &mix->stage[i];
        if (usp_stage_forward(stage, 1) || usp_stage_backward(stage) || usp_stage_gather(stage, 1, &alone[i])) return 1;
    }
    for (int i = 0; i < calls && !failed; i++) failed = call_one(mix);
    for (int i = 0; i < STREAMS && !failed; i++)
        failed = usp_world_synchronize(mix->rank->world, mix->stream[i]) != USP_OK;
    for (int i = 0; i < 2; i++) {
        failed = failed || compare_mixed(mix, i, &alone[i]);
        usp_whole_free(&alone[i]);
    }
    return failed;
}

int usp_body_interleavings(usp_rank *rank, void *argument) {
    const int *calls = argument;
    usp_mix mix = {.rank = rank, .draw = 7};
    for (int i = 0; i < STREAMS; i++)
        if (usp_gpu_stream_create(&mix.stream[i]) != USP_OK) return usp_say(rank, "no stream");
    for (int i = 0; i < 2; i++) {
        cudaEventCreateWithFlags(&mix.done[i], cudaEventDisableTiming);
        if (open_pair(rank, i, &mix.stage[i])) return 1;
    }
    if (run_mix(&mix, *calls)) return usp_say(rank, "in a mix of calls: %s", usp_last_error());
    for (int i = 1; i >= 0; i--) {
        usp_stage_close(&mix.stage[i]);
        cudaEventDestroy(mix.done[i]);
    }
    for (int i = 0; i < STREAMS; i++) usp_gpu_stream_destroy(mix.stream[i]);
    usp_count(rank);
    return 0;
}
