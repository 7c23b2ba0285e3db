/* absent.c - stands in for the backends that this build does not have: each constructor says so. */
#include "comm.h"
#include "error.h"

#ifndef USP_HAVE_CUDA
usp_status usp_device_create_cuda(const usp_host *host, usp_device **device) {
    (void)host, (void)device;
    return usp_fail(USP_UNSUPPORTED, "this libusp was built without CUDA");
}

int usp_device_count_cuda(void) {
    return 0;
}

usp_status usp_device_select_cuda(int index) {
    (void)index;
    return usp_fail(USP_UNSUPPORTED, "this libusp was built without CUDA");
}
#endif

#ifndef USP_HAVE_NCCL
static usp_status no_nccl(void) {
    return usp_fail(USP_UNSUPPORTED, "this libusp was built without NCCL");
}

usp_status usp_comm_create_nccl(const usp_comm_config *config, const usp_bootstrap *bootstrap, usp_comm **comm) {
    (void)config, (void)bootstrap, (void)comm;
    return no_nccl();
}

usp_status usp_comm_create_nccl_id(const usp_comm_config *config, const usp_unique_id *id, int size, int rank,
                                   usp_comm **comm) {
    (void)config, (void)id, (void)size, (void)rank, (void)comm;
    return no_nccl();
}

usp_status usp_comm_create_nccl_borrowed(const usp_comm_config *config, struct ncclComm *borrowed, usp_comm **comm) {
    (void)config, (void)borrowed, (void)comm;
    return no_nccl();
}

usp_status usp_nccl_unique_id(usp_unique_id *id) {
    (void)id;
    return no_nccl();
}
#endif

#ifndef USP_HAVE_MPI
usp_status usp_comm_create_mpi(const usp_comm_config *config, int fortran_comm, usp_status mine, usp_comm **comm) {
    (void)config, (void)fortran_comm, (void)mine, (void)comm;
    return usp_fail(USP_UNSUPPORTED, "this libusp was built without MPI");
}
#endif
