/* status.c - status sentences, this thread's last error, version and dtype sizes.
 * It keeps one sentence per thread and nothing else; it never logs. */
#include <stdarg.h>
#include <stdio.h>

#include "error.h"

static _Thread_local char usp_error_text[512];

usp_status usp_fail(usp_status status, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(usp_error_text, sizeof usp_error_text, format, args);
    va_end(args);
    return status;
}

const char *usp_last_error(void) {
    return usp_error_text;
}

const char *usp_status_string(usp_status status) {
    switch (status) {
#define USP_STATUS_CASE(name, value, text)                                                                             \
    case USP_##name:                                                                                                   \
        return text;
        USP_STATUS_MAP(USP_STATUS_CASE)
#undef USP_STATUS_CASE
    default:
        return "unknown status";
    }
}

int usp_version(void) {
    return USP_VERSION_MAJOR * 10000 + USP_VERSION_MINOR * 100 + USP_VERSION_PATCH;
}

size_t usp_dtype_size(usp_dtype dtype) {
    switch (dtype) {
    case USP_F32:
        return 4;
    case USP_F16:
        return 2;
    case USP_BF16:
        return 2;
    default:
        return 0;
    }
}
