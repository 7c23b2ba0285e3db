/* layer_options.h - options that are fields of usp_layer_config, by the library's own table: --window-left, --route,
 * ... They check what a field says alone; the rest is for the library to say. */
#ifndef USP_LAYER_OPTIONS_H
#define USP_LAYER_OPTIONS_H
#include <argp.h>
#include <fields.h>

enum { USP_LAYER_OPTIONS = 16 };

/* Room for what argp is given; it must outlive the parsing. */
typedef struct usp_layer_options {
    struct argp argp;
    struct argp_child children[2];
    struct argp_option option[USP_LAYER_OPTIONS + 2]; /* a heading, and an end */
    char name[USP_LAYER_OPTIONS][USP_FIELD_TEXT], value[USP_LAYER_OPTIONS][64];
} usp_layer_options;

/* What argp takes as `children`. The child's input is the usp_layer_config to set. heading: of the group; NULL: the
 * parent's. */
const struct argp_child *usp_layer_options_make(usp_layer_options *options, const char *heading, int group);

/* Makes fields that the config's kind or mask does not have their defaults. */
void usp_layer_options_fit(usp_layer_config *config);

#endif
