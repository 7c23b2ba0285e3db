/* fields.h - the fields of usp_layer_config as one table. Checks, refusals, agreement and descriptions go by it, and so
 * do the options of the tools, which compile the same file: it knows the public header only. */
#ifndef USP_FIELDS_H
#define USP_FIELDS_H
#include "usp.h"

typedef enum usp_form_of_field {
    USP_FIELD_INT,
    USP_FIELD_FLAG,
    USP_FIELD_ENUM,
    USP_FIELD_INT64,
    USP_FIELD_FLOAT,
    USP_FIELD_HEADS /* floats, one a head of the output, or NULL */
} usp_form_of_field;

/* 0 and NULL are every field's default. Values lie in least .. most, ends included, and are finite. */
typedef struct usp_layer_field {
    const char *name;
    size_t offset;
    usp_form_of_field form;
    usp_attention only; /* the one kind that has it; 0: both */
    usp_mask mask;      /* the one mask that has it; 0: both */
    double least, most;
    const char *values; /* names of the values from `least` on, "auto|relay"; NULL: numbers */
    const char *help;   /* of an option that sets it; NULL: tools set it in their own ways */
} usp_layer_field;

/* Ends with a NULL name. */
extern const usp_layer_field usp_layer_fields[];

/* Bytes that it has in the struct. */
size_t usp_layer_field_size(const usp_layer_field *field);
/* Its value, where it is no array; of an array whether it is there. */
double usp_layer_field_value(const usp_layer_field *field, const usp_layer_config *config);
/* A value that it may have, as its name or number. Returns `text`. */
enum { USP_FIELD_TEXT = 32 };
const char *usp_layer_field_text(const usp_layer_field *field, double value, char text[USP_FIELD_TEXT]);

#endif
