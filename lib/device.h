/* device.h - the device table: memory, streams and kernels. Every device fills every entry itself; nothing is NULL.
 * lib/cpu/ is the specification; cuda/ must agree with it.
 *
 * All kernels run on `stream` and return after launching (CPU: when done). Tensors are [token, batch, head, dim] by
 * strides in elements with dense dim (usp_tensor); any stride and alignment is legal. Running sums are fp32. Counts may
 * be zero. Kernels check nothing: lib/ has, at create. A NaN or infinity reaches only what depends on it: pairs that
 * are not allowed, and padding, are left out of sums, since 0 times NaN is NaN. */
#ifndef USP_DEVICE_H
#define USP_DEVICE_H
#include "host.h"

typedef struct usp_device usp_device;
typedef struct usp_event usp_event; /* a point in a stream; may be recorded again and again */

/* Head h of the layer reads head (h + offset) / group of a tensor whose heads are shared; group 1, offset 0: its own.
 */
typedef struct usp_head_map {
    int group, offset;
} usp_head_map;

/* ---- pairs and tiles: what a mask allows, planned with integers (lib/mask.c, lib/tiles.c), in device memory ------ */

/* Which pairs of a block of queries and a block of keys are allowed, by position: query q sees key k iff
 * low[q] <= key[k] <= high[q] and, where `last` is given (prefix trees), query[q] <= last[k]. A query with low > high
 * sees no key. Kernels know no mask by any other name. */
typedef struct usp_pairs {
    const int32_t *query, *low, *high; /* [queries] */
    const int32_t *key;                /* [keys] */
    const int32_t *last;               /* [keys] or NULL: the last position of a query that may see the key */
    const int32_t *diagonal;           /* [queries] the key position opposite the query: biases count from there */
} usp_pairs;

enum {
    USP_WORK_ROWS = 128, /* rows of one work item at most: kernels cut it further, never join two */
    USP_TURN_ROWS = 64   /* rows of queries whose gradients are added to by one block after the other */
};

/* Consecutive rows of one side of the score matrix. Its tiles are tile[first_tile .. first_tile + tiles). */
typedef struct usp_work {
    int32_t begin, count, first_tile, tiles;
} usp_work;

/* Columns [begin, end) of the other side, one or more. Every allowed pair of the work's rows is in one tile, no pair is
 * in two; in columns [full_begin, full_end) every pair is allowed (the range may be empty), elsewhere usp_pairs
 * decides. */
typedef struct usp_tile {
    int32_t begin, end, full_begin, full_end;
} usp_tile;

/* Items of a list. even: the last one has as many columns as the first; says nothing that results depend on. */
typedef struct usp_tile_count {
    int32_t works, even;
} usp_tile_count;

/* A list whose number of items is read on the device, so that captured launches follow new documents: a grid has room
 * for `capacity` items, and what is behind count->works returns at once. Items with more columns come first: a device
 * that begins them in this order ends with light ones. */
typedef struct usp_tiles {
    const usp_work *work;
    const usp_tile *tile;
    const usp_tile_count *count;
    int capacity;
} usp_tiles;

/* ---- kernel arguments -------------------------------------------------------------------------------------------- */

/* to = from, or to += from (fp32 `to` only), converting between dtypes (round to nearest even). Token i is row
 * from_row[i] of `from` and to_row[i] of `to`; NULL: row i. Not overlapping. */
typedef struct usp_copy {
    int64_t tokens;
    int batch, heads, dim;
    usp_dtype from_dtype, to_dtype;
    usp_tensor from, to;
    const int32_t *from_row, *to_row; /* [tokens], device memory */
    int accumulate;
} usp_copy;

/* Attention dropout (lib/dropout.h): a pair is kept iff its number, a function of the state and of (batch, head of
 * the whole layer, query position, key position), is at least rate * 2^15; what is kept is divided by 1 - rate. */
typedef struct usp_dropout {
    float rate;            /* as usp_dropout_rate rounds it; 0: none, and `state` is not read */
    int first_head, heads; /* head h of the call is first_head + h of `heads` of the layer */
    const uint64_t *state; /* device memory: seed, offset */
} usp_dropout;

/* Softmax attention of a block of queries and a block of keys. Head h of q, out, dout and of what is kept per row is
 * local head h; k, v, dk, dv go through `kv`. The score of a pair is s = scale q.k, then soft_cap tanh(s / soft_cap)
 * if soft_cap > 0, then minus slopes[h] |diagonal[q] - key[k]| if slopes are given.
 *
 * What is kept of a row, [batch, heads, queries] each, is (top, sum): the sum over its pairs of weight(score - top),
 * where top is a number near the row's largest score, -inf while there is none, in a unit of the device's own. Nothing
 * is rounded between folds, and weight(score - top) / sum is a pair's probability, as exact as fp32 at any size of the
 * scores. */
typedef struct usp_softmax {
    usp_dtype dtype;
    int batch, heads, key_heads, dim, value_dim;
    usp_head_map kv;
    float scale, soft_cap;
    const float *slopes; /* [heads] or NULL */
    const float *sinks;  /* [heads] or NULL: a score for every row that weighs in its sum and has no value */
    usp_dropout dropout;
    int64_t queries, keys; /* rows of the two blocks */
    usp_tensor q, k, v;    /* dtype */
    usp_pairs pairs;
    usp_tiles by_query, by_key; /* rows are queries; rows are keys (backward) */
    int deterministic;          /* 1: no kernel whose result depends on timing */
    int slices;                 /* of a call's heads, alike, one of which this is, 0 being 1: an order of sums that
                                   follows from heads follows from the whole call's */
    int first, last;            /* of the blocks of keys that are folded into these queries. first: what is kept begins
                                   here; last: it is completed, by the sinks too, and results are written. by_query has
                                   every row of the queries in one item if first or last, by_key every row always */
    float *top, *sum;
    /* forward: acc, fp32 [queries, batch, heads, value_dim] dense, is the sum of weights times values. If last:
     * out = acc / sum, 0 for a row without any key; lse, natural, if it is not NULL (of such a row the sink, or -inf);
     * acc may be NULL if first and last. */
    float *acc;
    float *peak; /* [batch, heads, queries] or NULL: each row's largest score, -inf if none, as (top, sum) folded */
    usp_tensor out;
    float *lse;
    /* backward: P = weight(score - top) / sum; dS = P (kept dout.v - delta); dq += scale dS k, to dq_sum (fp32, any
     * strides) or, if last, to dq; then dq_sum may be spoiled, and if first too it need not be given but where the
     * device needs it. dk = scale dS^T q and dv = (kept P)^T dout of this block alone, to key_dtype, which
     * is dtype or fp32. Rows with sum 0 contribute nothing. Fixed order, no atomics, if deterministic. */
    usp_tensor dout;    /* dtype */
    const float *delta; /* [batch, heads, queries] */
    usp_tensor dq_sum, dq;
    usp_dtype key_dtype;
    usp_tensor dk, dv;
    const float *dlse; /* of softmax_delta: [batch, heads, queries], the gradient of lse, or NULL */
    int32_t *turns;    /* where dq_sum is given, if deterministic: [batch, heads, queries over USP_TURN_ROWS, rounded
                          up], to work in */
    void *scratch;     /* as the device's entry `needs` says; contents free between kernels */
} usp_softmax;

/* Linear attention over chunks: runs of consecutive positions, in ascending order, a block at a time. Block i covers
 * rows begin .. begin + count of one chunk, block[].chunk says which. All block arrays are in device memory. With
 * `reverse`, time runs backward: "before" means after. Head h reads head maps of q, k and v; states are per layer head.
 * `log_decay` is [heads] on the device, NULL: lambda = 1. */
typedef struct usp_block {
    int32_t begin, count, chunk;
    int32_t
        distance; /* rows of the chunk before this block, in position order; `chunk_rows` below includes the block */
    int32_t chunk_rows, padding;
} usp_block;

typedef struct usp_linear {
    usp_dtype dtype;
    int batch, heads, dim, value_dim; /* dim: of q and k; value_dim: of v and out */
    usp_head_map q_map, k_map, v_map;
    float scale; /* of every product with q */
    const float *log_decay;
    int causal, reverse;
    int shift;      /* see each entry */
    int transposed; /* states are stored [value_dim, dim] instead of [dim, value_dim] */
    const usp_block *block;
    int blocks;
    const int32_t *begins, *ends; /* [tokens] or NULL (one document), device memory: the first and last row of row i's
                                     document in its chunk; one less than the chunk's first row where the document began
                                     before it, one more than its last row where it goes on. States and products do not
                                     cross from one document to another. */
    int64_t tokens;
    usp_tensor q, k, v; /* dtype */
    float *states;      /* fp32, [blocks or chunks][batch][heads][dim][value_dim] (last two swapped if transposed) */
    int deterministic;  /* 1: no kernel whose result depends on timing */
    int first, last;    /* first: acc is not read; last: write dtype to out, else fp32 to acc */
    float *acc;         /* fp32 [tokens, batch, heads, value_dim] dense */
    usp_tensor out;     /* [.., heads, ..]: per layer head, no map */
    void *scratch;      /* of totals, output and apply, as in usp_softmax */
} usp_linear;

/* Exclusive scan over n states of `elements` floats per head: x = initial or 0; for i ascending (descending if
 * reverse): t = states[i]; states[i] = x; x = exp(log_decay[head] * length[i]) * x + t, or x = t where a document
 * begins (if reverse: ends) among its rows; and at the end final = x. A scan runs over each group of consecutive states
 * with equal `group`, each from `initial[group]`, to `final[group]`. One state is [batch][heads][elements]. initial and
 * final may be NULL; final may not alias initial. states[i] lies at place[i] of data, where place is given. */
typedef struct usp_scan_step {
    int32_t length, group;
    int32_t begins,
        ends; /* 1: a document begins after the first token of all, or ends before the last, in these rows */
} usp_scan_step;

typedef struct usp_scan {
    int batch, heads;
    int64_t elements;
    const float *log_decay;
    int reverse;
    const usp_scan_step *step; /* [states], device memory; groups ascending from 0 */
    const int32_t *place;      /* [states], device memory; NULL: in order */
    int states, groups;
    float *data;
    const float *initial;
    float *final;
} usp_scan;

/* What a layer will ask of the kernels: numbers that all ranks agree on, so that all ranks are refused or none. */
typedef struct usp_kernel_shape {
    usp_attention attention;
    usp_dtype dtype;
    int batch, heads; /* heads of the whole layer */
    int dim, value_dim;
    int deterministic; /* 1: no kernel whose result depends on timing */
} usp_kernel_shape;

/* What a layer's kernels need of it. */
typedef struct usp_kernel_needs {
    size_t scratch; /* bytes to work in, one kernel at a time */
    int64_t items;  /* of work, times heads and batch, that keep the device busy */
    int query_sums; /* softmax_backward may add to dq_sum in calls that are first and last too: it is given there */
} usp_kernel_needs;

typedef struct usp_device_ops {
    const char *name;
    usp_device_kind kind;

    /* Free and destroy take NULL, and do nothing then.
     * memory: 256-byte aligned; NO_MEMORY. copy and zero run in stream order; copies between any two memories, copy_2d
     * of rows of `bytes` at these distances, which are `bytes` at least and less than 2^31. */
    usp_status (*alloc)(usp_device *, size_t bytes, void **);
    void (*free)(usp_device *, void *);
    usp_status (*copy)(usp_device *, void *to, const void *from, size_t bytes, usp_stream);
    usp_status (*copy_2d)(usp_device *, void *to, size_t to_stride, const void *from, size_t from_stride, size_t bytes,
                          int64_t rows, usp_stream);
    usp_status (*zero)(usp_device *, void *, size_t bytes, usp_stream);
    /* Host memory from which copies run without the host (page-locked); NO_MEMORY. */
    usp_status (*alloc_host)(usp_device *, size_t bytes, void **);
    void (*free_host)(usp_device *, void *);

    /* streams and events. query: *busy = 0 once all work on the stream is done; DEVICE if it failed. */
    usp_status (*stream_create)(usp_device *, usp_stream *);
    void (*stream_destroy)(usp_device *, usp_stream);
    usp_status (*query)(usp_device *, usp_stream, int *busy);
    usp_status (*event_create)(usp_device *, usp_event **);
    void (*event_destroy)(usp_device *, usp_event *);
    usp_status (*event_record)(usp_device *, usp_event *, usp_stream);
    usp_status (*event_wait)(usp_device *, usp_event *, usp_stream); /* the stream waits, not the host */
    usp_status (*event_query)(usp_device *, usp_event *, int *busy);
    usp_status (*capturing)(usp_device *, usp_stream, int *yes); /* is a graph being captured on the stream? */

    /* kernels */
    /* UNSUPPORTED with the reason, or OK: then the entries below serve every call of the layer, of any size. */
    usp_status (*supports)(usp_device *, const usp_kernel_shape *);
    usp_kernel_needs (*needs)(usp_device *, const usp_kernel_shape *);
    /* A list of copies, in any order or side by side: none reads or writes what another one writes. */
    usp_status (*copy_rows)(usp_device *, const usp_copy *copies, int count, usp_stream);
    usp_status (*softmax_forward)(usp_device *, const usp_softmax *, usp_stream);
    /* delta[b, h, t] = sum over value_dim of dout * out, minus dlse, fp32. Of the arguments it reads dtype, batch,
     * heads, value_dim, queries, dout, out and dlse. */
    usp_status (*softmax_delta)(usp_device *, const usp_softmax *, float *delta, usp_stream);
    usp_status (*softmax_backward)(usp_device *, const usp_softmax *, usp_stream); /* dq, dk, dv */
    /* gradient[h] = - sum over batch and queries of P of the sink times delta; after the last forward. Reads heads,
     * batch, queries, sinks, top, sum, delta. In a fixed order. */
    usp_status (*softmax_sinks)(usp_device *, const usp_softmax *, float *gradient, usp_stream);
    /* most[h] = the largest of `peak` over batch and queries, -inf if none. Reads heads, batch, queries, peak. */
    usp_status (*softmax_peaks)(usp_device *, const usp_softmax *, float *most, usp_stream);
    /* The block length that suits a run of `rows` rows; a function of that alone, so that results do not depend on how
     * heads are spread. */
    int64_t (*linear_block)(usp_device *, int64_t rows);
    /* states[block] = sum over the block's rows j of lambda^(n_j + shift) k_j v_j^T, n_j = rows of the block after j
     * (before j if reverse). q is not used. */
    usp_status (*linear_totals)(usp_device *, const usp_linear *, usp_stream);
    usp_status (*linear_scan)(usp_device *, const usp_scan *, usp_stream);
    /* out_i = scale * ( sum over rows j of the block with j <= i (>= i if reverse) of lambda^|i-j| (q_i.k_j) v_j
     *                   + lambda^(n_i + shift) q_i^T states[block] ), n_i = rows of the block before i (after if
     * reverse). Ignores acc unless !first. causal only. */
    usp_status (*linear_output)(usp_device *, const usp_linear *, usp_stream);
    /* out_i = (first ? 0 : acc_i) + scale * lambda^(n_i + shift) q_i^T states[chunk], n_i = rows of the chunk before i
     * (after if reverse); lambda^... = 1 if not causal. k and v are not used. */
    usp_status (*linear_apply)(usp_device *, const usp_linear *, usp_stream);
    /* data[i] *= factor, fp32 */
    usp_status (*scale)(usp_device *, float *data, int64_t count, float factor, usp_stream);

    void (*destroy)(usp_device *);
} usp_device_ops;

struct usp_device {
    const usp_device_ops *ops;
    const usp_host *host; /* outlives the device */
};

/* Of the kind, or of the best one there is; then the constructors that lib/devices.c chooses from. */
usp_status usp_device_create(const usp_host *host, usp_device_kind kind, usp_device **device);
usp_status usp_device_create_cpu(const usp_host *host, usp_device **device);
usp_status usp_device_create_cuda(const usp_host *host, usp_device **device); /* the thread's current GPU */
int usp_device_count_cuda(void);
usp_status usp_device_select_cuda(int index);

#endif
