/* no_peer.c - a library to be preloaded: a rank that cannot have the peer transport. NO_PEER=shm: it shares no memory
 * of the host with others; NO_PEER=ipc: nor of GPUs. */
#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

static int fails(const char *what) {
    const char *asked = getenv("NO_PEER");
    return asked && strcmp(asked, what) == 0;
}

static void find(const char *name, void *entry) {
    void *found = dlsym(RTLD_NEXT, name);
    memcpy(entry, &found, sizeof found);
}

/* NCCL has files of its own there. */
int shm_open(const char *name, int flags, mode_t mode) {
    int (*inside)(const char *, int, mode_t);
    find("shm_open", &inside);
    if (strncmp(name, "/usp-", 5) != 0 || !fails("shm")) return inside(name, flags, mode);
    errno = EACCES;
    return -1;
}

cudaError_t cudaIpcOpenMemHandle(void **memory, cudaIpcMemHandle_t handle, unsigned flags) {
    cudaError_t (*inside)(void **, cudaIpcMemHandle_t, unsigned);
    find("cudaIpcOpenMemHandle", &inside);
    return fails("ipc") ? cudaErrorInvalidResourceHandle : inside(memory, handle, flags);
}
