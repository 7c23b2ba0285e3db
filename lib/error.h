/* error.h - this thread's last error sentence, and the only two error macros. */
#ifndef USP_ERROR_H
#define USP_ERROR_H
#include "usp.h"

/* Records the sentence for usp_last_error() and returns `status`, so that `return usp_fail(...)` is one statement. */
usp_status usp_fail(usp_status status, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Leaves the function with the status of a call that failed; its sentence is already recorded. */
#define USP_TRY(call)                                                                                                  \
    do {                                                                                                               \
        usp_status usp_try_status = (call);                                                                            \
        if (usp_try_status != USP_OK) return usp_try_status;                                                           \
    } while (0)

/* Leaves the function with INVALID and a sentence unless `condition` holds. */
#define USP_REQUIRE(condition, ...)                                                                                    \
    do {                                                                                                               \
        if (!(condition)) return usp_fail(USP_INVALID, __VA_ARGS__);                                                   \
    } while (0)

#endif
