/* layer.h - a layer: its resolved configuration, where its heads live, and the plan it follows. */
#ifndef USP_LAYER_H
#define USP_LAYER_H
#include "attn.h"
#include "config.h"
#include "plan.h"

enum { USP_OPERANDS = 4 };

/* A list of messages being put together for one exchange. With no arrays it only counts. */
struct usp_messages {
    usp_message *send, *recv;
    int sends, recvs;
    usp_axis axis; /* whose lane it takes */
    int reaches;   /* messages may arrive in shared memory */
    int64_t bytes_sent, bytes_received;
};

/* A list of copies being put together for one launch. */
typedef struct usp_copies {
    usp_copy *copy;
    int count;
} usp_copies;

/* Consecutive heads of a tensor. */
typedef struct usp_head_range {
    int first, count;
} usp_head_range;

/* What calls get to work in. */
typedef enum usp_memory { USP_FORWARD_WORKSPACE, USP_BACKWARD_WORKSPACE, USP_EXCHANGE_WORKSPACE, USP_SAVED } usp_memory;

struct usp_layer {
    usp_object object;
    usp_world *world;
    usp_mesh mesh; /* a copy, for this rank's place; communicators in it stay the mesh's */
    usp_sequence *sequence;
    usp_plan *plan;
    usp_layer_config config; /* resolved: no default is left; its arrays point to nothing */
    int heads;               /* H */
    int total[USP_OPERANDS]; /* heads of q, k, v, out */
    int dim[USP_OPERANDS];
    int shared[USP_OPERANDS]; /* several ulysses ranks hold some head of it */
    const usp_attn_ops *attn;
    usp_sizes sizes;
    usp_kernel_needs needs;
    float *decay, *slopes; /* device, own heads; NULL: none */
    int groups;            /* of heads that are exchanged and worked on one after the other */
    int alike;             /* calls get shared memory, which all ranks carve alike and some lane reaches */
    usp_messages messages;
    usp_copies copies;
    void *list_memory;
};

/* The heads of an operand that ulysses rank u needs: those its share of the H output heads reads. */
usp_head_range usp_layer_heads(const usp_layer *layer, usp_operand operand, int u);
/* How local output heads of this rank read an operand's local heads. */
usp_head_map usp_layer_head_map(const usp_layer *layer, usp_operand operand);
/* Fills in heads, dims and who shares them. */
void usp_layer_set_heads(usp_layer *layer);

/* Output heads of this rank. */
static inline int usp_layer_own_heads(const usp_layer *layer) {
    return usp_layer_heads(layer, USP_OUT, layer->mesh.u).count;
}

/* Numbers in one head's state of linear attention. */
static inline int64_t usp_layer_state_elements(const usp_layer *layer) {
    return (int64_t)layer->dim[USP_QUERY] * layer->dim[USP_VALUE];
}

/* World rank of ring rank r in this rank's row. */
static inline int usp_layer_ring_rank(const usp_layer *layer, int r) {
    return usp_mesh_rank(&layer->mesh, layer->mesh.u, r);
}

/* What is sent along the axis may arrive in what calls get. */
static inline int usp_layer_reaches(const usp_layer *layer, usp_axis axis) {
    return layer->alike && layer->mesh.lane[axis].transport->ops->reaches;
}

/* The stream of the axis' exchanges. */
static inline usp_stream usp_layer_transfer(const usp_layer *layer, usp_axis axis) {
    return layer->world->transfer[layer->mesh.lane[axis].number];
}

/* Message lists. begin empties the layer's list, for exchanges along an axis; exchange puts it on the axis' transfer
 * stream, run does so behind what `stream` has now; join makes `stream` wait for what the axis' stream has. */
usp_messages *usp_messages_begin(usp_layer *layer, usp_axis axis);
int usp_messages_are_none(const usp_messages *messages);
/* `there`: where it arrives in what is carved, as all ranks carve it; NULL: anywhere. Counts where `data` is NULL. */
void usp_messages_send(usp_messages *messages, int peer, const void *data, int64_t bytes, void *there);
void usp_messages_recv(usp_messages *messages, int peer, void *data, int64_t bytes, void *there);
void usp_messages_send_rows(usp_messages *messages, usp_message rows);
void usp_messages_recv_rows(usp_messages *messages, usp_message rows);
usp_status usp_messages_exchange(usp_layer *layer);
usp_status usp_messages_run(usp_layer *layer, usp_stream stream);
usp_status usp_messages_join(usp_layer *layer, usp_axis axis, usp_stream stream);

/* Copy lists. add leaves out what has no elements; run launches and empties the list. */
void usp_copies_add(usp_layer *layer, usp_copy copy);
usp_status usp_copies_run(usp_layer *layer, usp_stream stream);

#endif
