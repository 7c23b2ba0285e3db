/* json.c - commas, indentation and escapes.
 * Bytes that are not UTF-8 become U+FFFD, so that every reader takes the file. */
#include "json.h"
#include <math.h>
#include <string.h>

/* Length of the UTF-8 sequence at `text`, 0 if it is none. */
static int sequence_length(const unsigned char *text) {
    int length = text[0] < 0x80                      ? 1
                 : text[0] >= 0xc2 && text[0] < 0xe0 ? 2
                 : (text[0] & 0xf0) == 0xe0          ? 3
                 : text[0] >= 0xf0 && text[0] < 0xf5 ? 4
                                                     : 0;
    for (int i = 1; i < length; i++)
        if ((text[i] & 0xc0) != 0x80) return 0;
    int overlong = (text[0] == 0xe0 && text[1] < 0xa0) || (text[0] == 0xf0 && text[1] < 0x90);
    int surrogate = text[0] == 0xed && text[1] > 0x9f, beyond = text[0] == 0xf4 && text[1] > 0x8f;
    return overlong || surrogate || beyond ? 0 : length;
}

static void write_string(FILE *stream, const char *text) {
    fputc('"', stream);
    for (const unsigned char *at = (const unsigned char *)text; *at;) {
        int length = sequence_length(at);
        if (*at == '"' || *at == '\\')
            fprintf(stream, "\\%c", *at);
        else if (*at < 0x20 || *at == 0x7f)
            fprintf(stream, "\\u%04x", *at);
        else if (length)
            fwrite(at, 1, (size_t)length, stream);
        else
            fputs("\\ufffd", stream);
        at += length ? length : 1;
    }
    fputc('"', stream);
}

static void begin_value(usp_json *json, const char *key) {
    if (json->filled) fputc(',', json->stream);
    if (json->depth) fprintf(json->stream, "\n%*s", 2 * json->depth, "");
    if (key) write_string(json->stream, key);
    if (key) fputs(": ", json->stream);
    json->filled = 1;
}

void usp_json_open(usp_json *json, const char *key, char bracket) {
    begin_value(json, key);
    fputc(bracket, json->stream);
    json->depth++;
    json->filled = 0;
}

void usp_json_close(usp_json *json, char bracket) {
    json->depth--;
    if (json->filled) fprintf(json->stream, "\n%*s", 2 * json->depth, "");
    fputc(bracket, json->stream);
    if (!json->depth) fputc('\n', json->stream);
    json->filled = 1;
}

void usp_json_text(usp_json *json, const char *key, const char *value) {
    begin_value(json, key);
    if (value)
        write_string(json->stream, value);
    else
        fputs("null", json->stream);
}

void usp_json_integer(usp_json *json, const char *key, int64_t value) {
    begin_value(json, key);
    fprintf(json->stream, "%lld", (long long)value);
}

void usp_json_real(usp_json *json, const char *key, double value) {
    begin_value(json, key);
    if (isfinite(value))
        fprintf(json->stream, "%.9g", value);
    else
        fputs("null", json->stream);
}

void usp_json_bool(usp_json *json, const char *key, int value) {
    begin_value(json, key);
    fputs(value ? "true" : "false", json->stream);
}
