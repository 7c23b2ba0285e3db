/* layer.h - a layer: its resolved configuration, where its heads live, and the schedule it follows. */
#ifndef USP_LAYER_H
#define USP_LAYER_H
#include "arena.h"
#include "attn.h"
#include "schedule.h"

enum { USP_OPERANDS = 4 };

/* A list of messages being put together for one exchange. With no arrays it only counts bytes. */
struct usp_messages {
    usp_send *send;
    usp_recv *recv;
    int sends, recvs;
    int64_t bytes_sent, bytes_received;
};

/* Consecutive heads of a tensor. */
typedef struct usp_head_range {
    int first, count;
} usp_head_range;

struct usp_layer {
    usp_object object;
    usp_world *world;
    usp_mesh mesh; /* a copy, for this rank's place; communicators in it stay the mesh's */
    usp_sequence *sequence;
    usp_schedule *schedule;
    usp_layer_config config; /* resolved: no default is left; decay points to nothing */
    int heads;               /* H */
    int total[USP_OPERANDS]; /* heads of q, k, v, out */
    int dim[USP_OPERANDS];
    int shared[USP_OPERANDS]; /* several ulysses ranks hold some head of it */
    const usp_attn_ops *attn;
    usp_sizes sizes;
    size_t scratch; /* bytes that its kernels work in */
    float *decay;   /* device, own heads; NULL: lambda = 1 */
    usp_messages messages;
    void *message_memory;
};

/* The heads of an operand that ulysses rank u needs: those its share of the H output heads reads. */
usp_head_range usp_layer_heads(const usp_layer *layer, usp_operand operand, int u);

/* Output heads of this rank. */
static inline int usp_layer_own_heads(const usp_layer *layer) {
    return usp_layer_heads(layer, USP_OUT, layer->mesh.u).count;
}

/* How local output heads of this rank read an operand's local heads. */
usp_head_map usp_layer_head_map(const usp_layer *layer, usp_operand operand);

/* Numbers in one head's state of linear attention. */
static inline int64_t usp_layer_state_elements(const usp_layer *layer) {
    return (int64_t)layer->dim[USP_QUERY] * layer->dim[USP_VALUE];
}

/* Checks a config and fills in its defaults; INVALID or UNSUPPORTED with a sentence that names the field. */
usp_status usp_layer_config_resolve(const usp_layer_config *given, usp_layer_config *config);
/* H of a resolved config. */
int usp_layer_config_heads(const usp_layer_config *config);
/* Heads of an operand in a resolved config. */
int usp_layer_config_operand_heads(const usp_layer_config *config, usp_operand operand);
/* Collective: a resolved config is the same on all ranks of the data copy. */
usp_status usp_layer_config_agree(const usp_mesh *mesh, usp_status mine, const usp_layer_config *config,
                                  const usp_sequence *sequence);

/* Message lists. begin empties the layer's list; exchange puts it on the transfer stream, run does so behind what
 * `stream` has now; join makes `stream` wait for it. */
usp_messages *usp_messages_begin(usp_layer *layer);
void usp_messages_send(usp_messages *messages, int peer, const void *data, int64_t bytes);
void usp_messages_recv(usp_messages *messages, int peer, void *data, int64_t bytes);
usp_status usp_messages_exchange(usp_layer *layer);
usp_status usp_messages_run(usp_layer *layer, usp_stream stream);
usp_status usp_messages_join(usp_layer *layer, usp_stream stream);

#endif
