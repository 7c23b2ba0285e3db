/* cost.c - what a layer needs, does and holds, as it reports it. */
#include "abi.h"
#include "error.h"
#include "run.h"

usp_status usp_layer_get_sizes(const usp_layer *layer, usp_sizes *sizes) {
    USP_REQUIRE(layer, "layer is NULL");
    USP_TRY(usp_guard_process(layer->world));
    return usp_abi_write(&layer->sizes, sizeof layer->sizes, sizes, "usp_sizes");
}

static void add_flops(const usp_layer *layer, usp_pass pass, usp_cost *cost) {
    int ring = layer->mesh.ring, ulysses = layer->mesh.ulysses;
    for (int r = 0; r < ring; r++) {
        double each = layer->attn->flops(layer, pass, r) * layer->config.batch;
        for (int u = 0; u < ulysses; u++) {
            double flops = each * usp_layer_heads(layer, USP_OUT, u).count;
            cost->flops_mean += flops / (ring * ulysses);
            if (flops > cost->flops_max) cost->flops_max = flops;
            if (r == layer->mesh.r && u == layer->mesh.u) cost->flops = flops;
        }
    }
}

usp_status usp_layer_get_cost(const usp_layer *layer, usp_pass pass, usp_cost *cost) {
    USP_REQUIRE(layer, "layer is NULL");
    USP_TRY(usp_guard_process(layer->world));
    USP_REQUIRE(pass == USP_PASS_FORWARD || pass == USP_PASS_BACKWARD, "pass is %d: forward or backward", (int)pass);
    usp_cost known = {0};
    usp_messages ulysses = {0}, ring = {0};
    usp_run_count_messages(layer, pass, &ulysses);
    layer->attn->count_messages(layer, pass, &ring);
    known.ulysses_send = ulysses.bytes_sent;
    known.ulysses_recv = ulysses.bytes_received;
    known.ring_send = ring.bytes_sent;
    known.ring_recv = ring.bytes_received;
    add_flops(layer, pass, &known);
    return usp_abi_write(&known, sizeof known, cost, "usp_cost");
}

usp_status usp_layer_get_shard(const usp_layer *layer, usp_shard *shard) {
    USP_REQUIRE(layer, "layer is NULL");
    USP_TRY(usp_guard_process(layer->world));
    usp_head_range heads[USP_OPERANDS];
    for (int i = 0; i < USP_OPERANDS; i++) heads[i] = usp_layer_heads(layer, (usp_operand)i, layer->mesh.u);
    usp_shard known = {.tokens = usp_plan_queries(layer->plan),
                       .key_tokens = usp_plan_keys(layer->plan),
                       .first_head = heads[USP_QUERY].first,
                       .heads = heads[USP_QUERY].count,
                       .first_key_head = heads[USP_KEY].first,
                       .key_heads = heads[USP_KEY].count,
                       .first_value_head = heads[USP_VALUE].first,
                       .value_heads = heads[USP_VALUE].count,
                       .first_out_head = heads[USP_OUT].first,
                       .out_heads = heads[USP_OUT].count};
    return usp_abi_write(&known, sizeof known, shard, "usp_shard");
}
