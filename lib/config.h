/* config.h - a layer's configuration: checked, completed, and the same on all ranks. */
#ifndef USP_CONFIG_H
#define USP_CONFIG_H
#include "sequence.h"

/* Checks a config and fills in its defaults; INVALID or UNSUPPORTED with a sentence that names the field. */
usp_status usp_layer_config_resolve(const usp_layer_config *given, usp_layer_config *config);
/* H of a resolved config. */
int usp_layer_config_heads(const usp_layer_config *config);
/* Heads of an operand in a resolved config. */
int usp_layer_config_operand_heads(const usp_layer_config *config, usp_operand operand);
/* Collective: a resolved config is the same on all ranks of the data copy. */
usp_status usp_layer_config_agree(const usp_mesh *mesh, usp_status mine, const usp_layer_config *config,
                                  const usp_sequence *sequence);

#endif
