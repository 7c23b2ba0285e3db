/* host.h - what the embedding program lends: host memory and a log. Every allocation of the library goes through here,
 * so a test can make any one of them fail. */
#ifndef USP_HOST_H
#define USP_HOST_H
#include "usp.h"

typedef struct usp_host {
    void *(*alloc)(void *user, size_t bytes);
    void (*free)(void *user, void *memory);
    void *user;
    void (*log)(void *user, int level, const char *text); /* may be NULL */
    void *log_user;
} usp_host;

/* The config's callbacks, or malloc and free. */
usp_host usp_host_from_config(const usp_world_config *config);

/* Zeroed memory; NO_MEMORY with a sentence that names `what`. Zero bytes give a valid pointer. */
usp_status usp_host_alloc(const usp_host *host, size_t bytes, const char *what, void **memory);
/* The same of `count` elements, unless *status is an error already: one check serves several. NULL then. */
void *usp_host_array(const usp_host *host, int64_t count, size_t bytes, const char *what, usp_status *status);
void usp_host_free(const usp_host *host, void *memory); /* NULL is fine */

void usp_host_log(const usp_host *host, int level, const char *format, ...) __attribute__((format(printf, 3, 4)));

#endif
