/* describe.c - a layer in words, for people. */
#include "fields.h"
#include "layer.h"
#include <stdarg.h>
#include <stdio.h>

/* A text under construction, cut to its capacity. */
typedef struct text {
    char *to;
    size_t capacity, length;
} text;

static void __attribute__((format(printf, 2, 3))) say(text *t, const char *format, ...) {
    va_list arguments;
    size_t room = t->length < t->capacity ? t->capacity - t->length : 0;
    va_start(arguments, format);
    int length = vsnprintf(room ? t->to + t->length : NULL, room, format, arguments);
    va_end(arguments);
    if (length > 0) t->length += (size_t)length;
}

static void say_field(text *t, const usp_layer_field *field, const usp_layer_config *config) {
    char value[USP_FIELD_TEXT];
    if (field->form == USP_FIELD_FLAG || field->form == USP_FIELD_HEADS)
        say(t, "%s", field->name);
    else
        say(t, "%s %s", field->name, usp_layer_field_text(field, usp_layer_field_value(field, config), value));
}

/* The fields from offset `begin` to `end` that are not at their defaults. */
static void say_fields(text *t, const usp_layer_config *config, size_t begin, size_t end) {
    const char *between = "";
    for (const usp_layer_field *field = usp_layer_fields; field->name; field++) {
        if (field->offset < begin || field->offset >= end || usp_layer_field_value(field, config) == 0) continue;
        say(t, "%s", between);
        say_field(t, field, config);
        between = ", ";
    }
}

static void say_config(text *t, const usp_layer *layer) {
    enum { FIRST = offsetof(usp_layer_config, batch), OPTIONS = offsetof(usp_layer_config, scale) };
    static const char *dtypes[] = {"f32", "f16", "bf16"};
    usp_layer_config c = layer->config;
    c.decay = layer->decay; /* not to be read, but to be there */
    c.slopes = layer->slopes;
    if (c.attention == USP_SOFTMAX) c.route = layer->plan->route.route;
    say(t, "%s attention, %s, %s\n", layer->attn->name, c.mask == USP_MASK_CAUSAL ? "causal" : "full", dtypes[c.dtype]);
    say(t, "  shape     tokens %lld, keys %lld, ", (long long)layer->sequence->query.tokens,
        (long long)layer->sequence->key.tokens);
    say_fields(t, &c, FIRST, OPTIONS);
    say(t, "\n  options   ");
    say_fields(t, &c, OPTIONS, sizeof c);
}

static void say_place(text *t, const usp_layer *layer) {
    static const char *layouts[] = {"zigzag", "contiguous", "stripe", "zigzag per document", "custom"};
    usp_head_range own = usp_layer_heads(layer, USP_OUT, layer->mesh.u);
    say(t, "\n  mesh      ulysses %d (rank %d) x ring %d (rank %d), copy %d of %d\n", layer->mesh.ulysses,
        layer->mesh.u, layer->mesh.ring, layer->mesh.r, layer->mesh.copy, layer->mesh.copies);
    say(t, "  lanes     ulysses by %s, ring by %s\n", layer->mesh.lane[USP_AXIS_ULYSSES].transport->ops->name,
        layer->mesh.lane[USP_AXIS_RING].transport->ops->name);
    say(t, "  layout    %s, %lld own tokens\n", layouts[layer->sequence->layout],
        (long long)layer->sequence->query.local[layer->mesh.p]);
    say(t, "  inner     %lld tokens, heads %d .. %d", (long long)usp_plan_queries(layer->plan), own.first,
        own.first + own.count - 1);
    say(t, layer->groups > 1 ? " in %d groups\n" : "\n", layer->groups);
}

static void say_cost(text *t, const usp_layer *layer, usp_pass pass) {
    usp_cost cost = {.struct_size = sizeof cost};
    usp_layer_get_cost(layer, pass, &cost);
    say(t, "  %s  %.4g GFLOP (busiest rank %.3g x the mean), sends %lld bytes ulysses, %lld bytes ring\n",
        pass == USP_PASS_FORWARD ? "forward " : "backward", cost.flops * 1e-9,
        cost.flops_mean > 0 ? cost.flops_max / cost.flops_mean : 1, (long long)cost.ulysses_send,
        (long long)cost.ring_send);
}

size_t usp_layer_describe(const usp_layer *layer, char *to, size_t capacity) {
    text t = {to, to ? capacity : 0, 0};
    if (t.capacity) to[0] = 0;
    if (!layer) return 0;
    say_config(&t, layer);
    say_place(&t, layer);
    say_cost(&t, layer, USP_PASS_FORWARD);
    say_cost(&t, layer, USP_PASS_BACKWARD);
    say(&t, "  memory    workspace %zu forward (%zu if it saves), %zu backward, saved %zu bytes\n",
        layer->sizes.forward_workspace, layer->sizes.forward_saving_workspace, layer->sizes.backward_workspace,
        layer->sizes.saved);
    return t.length;
}
