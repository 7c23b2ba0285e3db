/* heads.c - which heads of which operand a ulysses rank works on. */
#include "layer.h"

static int first_out_head(const usp_layer *layer, int u) {
    return (int)((int64_t)u * layer->heads / layer->mesh.ulysses);
}

usp_head_range usp_layer_heads(const usp_layer *layer, usp_operand operand, int u) {
    int begin = first_out_head(layer, u), end = first_out_head(layer, u + 1);
    int group = layer->heads / layer->total[operand];
    if (begin == end) return (usp_head_range){begin / group, 0};
    return (usp_head_range){begin / group, (end - 1) / group - begin / group + 1};
}

usp_head_map usp_layer_head_map(const usp_layer *layer, usp_operand operand) {
    int group = layer->heads / layer->total[operand];
    return (usp_head_map){group, first_out_head(layer, layer->mesh.u) % group};
}

/* Do several ulysses ranks hold some head of the operand? */
static int has_replicas(const usp_layer *layer, usp_operand operand) {
    int end = 0;
    for (int u = 0; u < layer->mesh.ulysses; u++) {
        usp_head_range heads = usp_layer_heads(layer, operand, u);
        if (!heads.count) continue;
        if (heads.first < end) return 1;
        end = heads.first + heads.count;
    }
    return 0;
}

void usp_layer_set_heads(usp_layer *layer) {
    const usp_layer_config *c = &layer->config;
    const int dims[USP_OPERANDS] = {c->head_dim, c->head_dim, c->value_dim, c->value_dim};
    layer->heads = usp_layer_config_heads(c);
    for (int i = 0; i < USP_OPERANDS; i++) {
        layer->total[i] = usp_layer_config_operand_heads(c, (usp_operand)i);
        layer->dim[i] = dims[i];
    }
    for (int i = 0; i < USP_OPERANDS; i++) layer->shared[i] = has_replicas(layer, (usp_operand)i);
}
