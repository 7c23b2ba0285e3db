/* absent.c - stands in for the backends that this build does not have: each constructor says so. */
#include "error.h"
#include "split.h"

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

usp_status usp_transport_create_peer(const usp_transport_config *config, usp_meeting *meeting,
                                     usp_transport **transport) {
    (void)config, (void)transport;
    usp_meeting_note(meeting, usp_fail(USP_UNSUPPORTED, "this libusp was built without CUDA"));
    return usp_meet(meeting);
}

usp_status usp_transport_create_near(const usp_transport_config *config, const int *node, usp_transport *transport) {
    (void)config, (void)node, (void)transport;
    return usp_fail(USP_UNSUPPORTED, "this libusp was built without CUDA");
}
#endif

#ifndef USP_HAVE_NCCL
static usp_status no_nccl(void) {
    return usp_fail(USP_UNSUPPORTED, "this libusp was built without NCCL");
}

usp_status usp_transport_create_nccl(const usp_transport_config *config, usp_meeting *meeting,
                                     usp_transport **transport) {
    (void)config, (void)transport;
    usp_meeting_note(meeting, no_nccl());
    return usp_meet(meeting);
}

usp_status usp_transport_create_nccl_id(const usp_transport_config *config, usp_meeting *meeting,
                                        const usp_unique_id *id, int size, int rank, usp_transport **transport) {
    (void)config, (void)meeting, (void)id, (void)size, (void)rank, (void)transport;
    return no_nccl();
}

usp_status usp_transport_create_nccl_borrowed(const usp_transport_config *config, usp_meeting *meeting,
                                              struct ncclComm *borrowed, usp_transport **transport) {
    (void)config, (void)meeting, (void)borrowed, (void)transport;
    return no_nccl();
}

usp_status usp_nccl_unique_id(usp_unique_id *id) {
    (void)id;
    return no_nccl();
}

usp_status usp_nccl_split(usp_transport *transport, int colour, int key, struct ncclComm **comm) {
    (void)transport, (void)colour, (void)key, (void)comm;
    return no_nccl();
}

void usp_nccl_split_destroy(usp_transport *transport, struct ncclComm *comm) {
    (void)transport, (void)comm;
}
#endif

#ifndef USP_HAVE_MPI
usp_status usp_transport_create_mpi(const usp_transport_config *config, usp_meeting *meeting, int fortran_comm,
                                    usp_transport **transport) {
    (void)config, (void)meeting, (void)fortran_comm, (void)transport;
    return usp_fail(USP_UNSUPPORTED, "this libusp was built without MPI");
}
#endif
