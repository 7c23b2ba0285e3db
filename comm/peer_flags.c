/* peer_flags.c - flags in host memory that all ranks of a host have mapped, and what streams do with them. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include "error.h"
#include "peer_state.h"

/* ---- the board --------------------------------------------------------------------------------------------------- */

static size_t flag_count(const usp_peer *self) {
    return (size_t)USP_LANES * (size_t)self->seats * (size_t)self->seats;
}

static size_t board_bytes(const usp_peer *self) {
    return flag_count(self) * sizeof(usp_peer_flags) + (size_t)self->seats * sizeof(uint32_t);
}

/* Maps the file of this descriptor, for the GPU too, and closes it. */
static usp_status map_board(usp_peer *self, int file) {
    usp_peer_board *board = &self->board;
    size_t bytes = board_bytes(self);
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (memory == MAP_FAILED) return usp_fail(USP_UNSUPPORTED, "cannot map %zu bytes: %s", bytes, strerror(errno));
    void *there = NULL;
    cudaError_t error = cudaHostRegister(memory, bytes, cudaHostRegisterPortable | cudaHostRegisterMapped);
    if (error == cudaSuccess) error = cudaHostGetDevicePointer(&there, memory, 0);
    if (error != cudaSuccess) {
        cudaHostUnregister(memory);
        cudaGetLastError();
        munmap(memory, bytes);
        return usp_fail(USP_UNSUPPORTED, "the GPU cannot map memory of the host: %s", cudaGetErrorString(error));
    }
    board->flags = memory;
    board->there = there;
    board->left = (uint32_t *)(board->flags + flag_count(self));
    board->bytes = bytes;
    return USP_OK;
}

/* Its memory is there for certain, so that no rank dies of a full file system. */
usp_status usp_peer_create_board(usp_peer *self) {
    char *name = self->board.name;
    uint64_t number = 0;
    if (getrandom(&number, sizeof number, 0) != sizeof number)
        return usp_fail(USP_UNSUPPORTED, "no random numbers: %s", strerror(errno));
    snprintf(name, USP_PEER_NAME, "/usp-%016llx", (unsigned long long)number);
    int file = shm_open(name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, S_IRUSR | S_IWUSR);
    int error = file < 0 ? errno : posix_fallocate(file, 0, (off_t)board_bytes(self));
    if (error == 0) return map_board(self, file);
    if (file >= 0) close(file);
    if (file < 0) name[0] = '\0';
    return usp_fail(USP_UNSUPPORTED, "cannot make a file of shared memory: %s", strerror(error));
}

usp_status usp_peer_open_board(usp_peer *self, const char *name) {
    if (self->board.flags) return USP_OK;
    int file = shm_open(name, O_RDWR | O_CLOEXEC, 0);
    if (file >= 0) return map_board(self, file);
    return usp_fail(USP_UNSUPPORTED, "cannot open the shared memory of the host's first rank: %s", strerror(errno));
}

void usp_peer_unlink_board(usp_peer *self) {
    if (self->board.name[0]) shm_unlink(self->board.name);
    self->board.name[0] = '\0';
}

void usp_peer_close_board(usp_peer *self) {
    usp_peer_unlink_board(self);
    if (!self->board.flags) return;
    if (cudaHostUnregister(self->board.flags) != cudaSuccess) cudaGetLastError();
    munmap(self->board.flags, self->board.bytes);
}

/* ---- streams ----------------------------------------------------------------------------------------------------- */

usp_status usp_peer_run(usp_peer *self, usp_peer_batch *batch, usp_stream stream) {
    unsigned count = batch->count;
    batch->count = 0;
    CUresult result = count ? self->batch((CUstream)stream, count, batch->operation, 0) : CUDA_SUCCESS;
    return result == CUDA_SUCCESS ? USP_OK : usp_fail(USP_DEVICE, "cuStreamBatchMemOp failed: %d", (int)result);
}

static usp_status add(usp_peer *self, usp_peer_batch *batch, CUstreamBatchMemOpParams operation, usp_stream stream) {
    if (batch->count == sizeof batch->operation / sizeof *batch->operation) USP_TRY(usp_peer_run(self, batch, stream));
    batch->operation[batch->count++] = operation;
    return USP_OK;
}

static CUdeviceptr address_of(const usp_peer *self, const usp_peer_flag *flag) {
    return (CUdeviceptr)(uintptr_t)(self->board.there + ((const char *)flag - (const char *)self->board.flags));
}

/* A flag's first word says that it is set. */
static CUstreamBatchMemOpParams write_of(const usp_peer *self, const usp_peer_flag *flag, uint32_t value) {
    return (CUstreamBatchMemOpParams){.writeValue = {.operation = CU_STREAM_MEM_OP_WRITE_VALUE_32,
                                                     .address = address_of(self, flag),
                                                     .value = value,
                                                     .flags = CU_STREAM_WRITE_VALUE_DEFAULT}};
}

usp_status usp_peer_set(usp_peer *self, usp_peer_batch *batch, usp_peer_flag *flag, usp_stream stream) {
    return add(self, batch, write_of(self, flag, 1), stream);
}

usp_status usp_peer_await(usp_peer *self, usp_peer_batch *batch, usp_peer_flag *flag, usp_stream stream) {
    unsigned how = CU_STREAM_WAIT_VALUE_GEQ | (self->flushes ? CU_STREAM_WAIT_VALUE_FLUSH : 0u);
    CUstreamBatchMemOpParams wait = {.waitValue = {.operation = CU_STREAM_MEM_OP_WAIT_VALUE_64,
                                                   .address = address_of(self, flag),
                                                   .value64 = 1,
                                                   .flags = how}};
    USP_TRY(add(self, batch, wait, stream));
    return add(self, batch, write_of(self, flag, 0), stream);
}

static usp_status pass_flag(usp_peer *self, usp_stream stream) {
    usp_peer_flag *flag = &usp_peer_flags_of(self, 0, self->base.rank, self->base.rank)->full;
    usp_peer_batch batch = {.count = 0};
    USP_TRY(usp_peer_set(self, &batch, flag, stream));
    USP_TRY(usp_peer_await(self, &batch, flag, stream));
    USP_TRY(usp_peer_run(self, &batch, stream));
    cudaError_t error = cudaStreamSynchronize((cudaStream_t)stream);
    return error == cudaSuccess ? USP_OK : usp_fail(USP_DEVICE, "a flag failed: %s", cudaGetErrorString(error));
}

usp_status usp_peer_try_flags(usp_peer *self) {
    usp_device *device = self->base.device;
    usp_stream stream = NULL;
    USP_TRY(device->ops->stream_create(device, &stream));
    usp_status status = pass_flag(self, stream);
    device->ops->stream_destroy(device, stream);
    return status == USP_OK ? USP_OK
                            : usp_fail(USP_UNSUPPORTED, "the GPU's streams cannot wait for 64-bit numbers of the host");
}

void usp_peer_release(usp_peer *self) {
    int rank = self->base.rank;
    for (int i = 0; self->board.flags && i < USP_LANES * self->base.size; i++) {
        int lane = i / self->base.size, other = i % self->base.size;
        if (!self->other[other].near && other != rank) continue;
        usp_peer_flags *flags = usp_peer_flags_of(self, lane, rank, other);
        __atomic_store_n(&flags->ready.stop, 1, __ATOMIC_RELEASE);
        __atomic_store_n(&flags->full.stop, 1, __ATOMIC_RELEASE);
    }
}
