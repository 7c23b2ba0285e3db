/* json.h - writes JSON to a stream, one value after the other.
 * Strings are escaped, numbers stay exact, and what is no number is written as null. */
#ifndef USP_JSON_H
#define USP_JSON_H
#include <stdint.h>
#include <stdio.h>

typedef struct usp_json {
    FILE *stream;
    int depth;
    int filled; /* the innermost object or array has a member */
} usp_json;

/* `key` is NULL inside an array and for the outermost value. */
void usp_json_open(usp_json *json, const char *key, char bracket);      /* '{' or '[' */
void usp_json_close(usp_json *json, char bracket);                      /* '}' or ']' */
void usp_json_text(usp_json *json, const char *key, const char *value); /* NULL: null */
void usp_json_integer(usp_json *json, const char *key, int64_t value);
void usp_json_real(usp_json *json, const char *key, double value);
void usp_json_bool(usp_json *json, const char *key, int value);

#endif
