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

usp_status usp_comm_create_nccl(const usp_comm_config *config, usp_meeting *meeting, usp_comm **comm) {
    (void)config, (void)comm;
    usp_meeting_note(meeting, no_nccl());
    return usp_meet(meeting);
}

usp_status usp_comm_create_nccl_id(const usp_comm_config *config, usp_meeting *meeting, const usp_unique_id *id,
                                   int size, int rank, usp_comm **comm) {
    (void)config, (void)meeting, (void)id, (void)size, (void)rank, (void)comm;
    return no_nccl();
}

usp_status usp_comm_create_nccl_borrowed(const usp_comm_config *config, usp_meeting *meeting, struct ncclComm *borrowed,
                                         usp_comm **comm) {
    (void)config, (void)meeting, (void)borrowed, (void)comm;
    return no_nccl();
}

usp_status usp_nccl_unique_id(usp_unique_id *id) {
    (void)id;
    return no_nccl();
}
#endif

#ifndef USP_HAVE_MPI
usp_status usp_comm_create_mpi(const usp_comm_config *config, usp_meeting *meeting, int fortran_comm, usp_comm **comm) {
    (void)config, (void)meeting, (void)fortran_comm, (void)comm;
    return usp_fail(USP_UNSUPPORTED, "this libusp was built without MPI");
}
#endif
