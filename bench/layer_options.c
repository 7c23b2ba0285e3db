/* layer_options.c - argp's table from the library's table of fields, and back into a config. */
#include "layer_options.h"
#include "tool.h"
#include <string.h>

enum {
    KEY_FIELD = 1024, /* + row of the table */
    MOST_NAMES = 8
};

/* window_left -> window-left */
static const char *option_name(const usp_layer_field *field, char name[USP_FIELD_TEXT]) {
    snprintf(name, USP_FIELD_TEXT, "%s", field->name);
    for (char *at = name; (at = strchr(at, '_'));) *at = '-';
    return name;
}

/* "X", "N", "auto|relay", "N|none|all"; NULL: takes no value. */
static const char *value_name(const usp_layer_field *field, char *text, size_t room) {
    if (field->form == USP_FIELD_FLAG) return NULL;
    const char *number = field->form == USP_FIELD_ENUM ? "" : field->form == USP_FIELD_FLOAT ? "X" : "N";
    snprintf(text, room, "%s%s%s", number, *number && field->values ? "|" : "", field->values ? field->values : "");
    return text;
}

/* 1 and the value if `text` is one of the field's names. */
static int find_name(const usp_layer_field *field, const char *text, double *value) {
    char name[USP_FIELD_TEXT];
    if (!field->values) return 0;
    for (*value = field->least; *value <= field->most && *value < field->least + MOST_NAMES; ++*value)
        if (strcmp(usp_layer_field_text(field, *value, name), text) == 0) return 1;
    return 0;
}

static int find_number(const usp_layer_field *field, const char *text, double *value) {
    int64_t whole = 0;
    if (field->form == USP_FIELD_ENUM) return 0;
    if (field->form == USP_FIELD_FLOAT) {
        if (!usp_parse_real(text, value)) return 0;
        double given = *value;
        *value = (float)given;
        return (given != 0) == (*value != 0); /* none that vanishes */
    }
    int found = usp_parse_size(text, &whole);
    *value = (double)whole;
    return found;
}

static void set_field(const usp_layer_field *field, double value, usp_layer_config *config) {
    char *to = (char *)config + field->offset;
    if (field->form == USP_FIELD_INT64)
        memcpy(to, &(int64_t){(int64_t)value}, sizeof(int64_t));
    else if (field->form == USP_FIELD_FLOAT)
        memcpy(to, &(float){(float)value}, sizeof(float));
    else
        memcpy(to, &(int){(int)value}, sizeof(int));
}

static void parse_field(struct argp_state *state, const usp_layer_field *field, const char *text) {
    char name[USP_FIELD_TEXT];
    double value = 1;
    int good = field->form == USP_FIELD_FLAG || find_name(field, text, &value) || find_number(field, text, &value);
    option_name(field, name);
    if (!good && field->form == USP_FIELD_ENUM)
        argp_error(state, "--%s: '%s' is none of %s", name, text, field->values);
    else if (!good || value < field->least || value > field->most)
        argp_error(state, "--%s: '%s' is not a %s from %.8g to %.10g", name, text,
                   field->form == USP_FIELD_FLOAT ? "float32" : "whole number", field->least, field->most);
    set_field(field, value, state->input);
}

static error_t parse_option(int key, char *text, struct argp_state *state) {
    if (key < KEY_FIELD || key >= ARGP_KEY_END) return ARGP_ERR_UNKNOWN;
    parse_field(state, &usp_layer_fields[key - KEY_FIELD], text);
    return 0;
}

const struct argp_child *usp_layer_options_make(usp_layer_options *o, const char *heading, int group) {
    int count = 0;
    *o = (usp_layer_options){.argp = {o->option, parse_option, NULL, NULL, NULL, NULL, NULL}};
    o->children[0].argp = &o->argp;
    struct argp_option *option = o->option;
    if (heading) *option++ = (struct argp_option){.doc = heading, .group = group};
    for (int i = 0; usp_layer_fields[i].name && count < USP_LAYER_OPTIONS; i++) {
        const usp_layer_field *field = &usp_layer_fields[i];
        if (!field->help) continue;
        *option++ = (struct argp_option){.name = option_name(field, o->name[count]),
                                         .key = KEY_FIELD + i,
                                         .arg = value_name(field, o->value[count], sizeof o->value[count]),
                                         .doc = field->help,
                                         .group = group};
        count++;
    }
    return o->children;
}

void usp_layer_options_fit(usp_layer_config *c) {
    for (const usp_layer_field *field = usp_layer_fields; field->name; field++)
        if ((field->only && field->only != c->attention) || (field->mask && field->mask != c->mask))
            memset((char *)c + field->offset, 0, usp_layer_field_size(field));
}
