/* host.c - host memory and the log, by the program's callbacks or by malloc, free and silence.
 * It keeps no account of what was allocated. */
#include "host.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"

static void *default_alloc(void *user, size_t bytes) {
    (void)user;
    return malloc(bytes);
}

static void default_free(void *user, void *memory) {
    (void)user;
    free(memory);
}

usp_host usp_host_from_config(const usp_world_config *config) {
    usp_host host = {.alloc = default_alloc, .free = default_free};
    if (!config) return host;
    if (config->host_alloc) {
        host.alloc = config->host_alloc;
        host.free = config->host_free;
        host.user = config->host_user;
    }
    host.log = config->log;
    host.log_user = config->log_user;
    return host;
}

usp_status usp_host_alloc(const usp_host *host, size_t bytes, const char *what, void **memory) {
    size_t size = bytes ? bytes : 1;
    *memory = host->alloc(host->user, size);
    if (!*memory) return usp_fail(USP_NO_MEMORY, "cannot allocate %zu bytes of host memory for %s", size, what);
    memset(*memory, 0, size);
    return USP_OK;
}

void *usp_host_array(const usp_host *host, int64_t count, size_t bytes, const char *what, usp_status *status) {
    void *memory = NULL;
    if (*status == USP_OK) *status = usp_host_alloc(host, (size_t)count * bytes, what, &memory);
    return memory;
}

void usp_host_free(const usp_host *host, void *memory) {
    if (memory) host->free(host->user, memory);
}

void usp_host_log(const usp_host *host, int level, const char *format, ...) {
    char text[512];
    if (!host->log) return;
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    host->log(host->log_user, level, text);
}
