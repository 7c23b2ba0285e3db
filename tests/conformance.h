/* conformance.h - what every transport must do, checked from outside through its table. All ranks of the transport call
 * the same check with the same seed; each prints what it finds wrong and returns how many things that were. */
#ifndef USP_CONFORMANCE_H
#define USP_CONFORMANCE_H
#include "transport.h"

/* Exchanges of random lists in random sub-groups, gathers, shared memory. Leaves the transport as usable as before. */
int usp_check_transport(usp_transport *transport, unsigned seed);

/* Rank 0 sends rank 1 another size than it expects: COMM, both sizes named, nothing written. Leaves the transport
 * failed. For transports that can know; needs 2 ranks. */
int usp_check_transport_mismatch(usp_transport *transport);

/* A rank's part in making a transport, as lib/world.c plays it: the meeting and its end are here. */
usp_status usp_make_threads(const usp_transport_config *config, usp_rendezvous *rendezvous, int rank,
                            usp_transport **transport);
usp_status usp_make_socket(const usp_transport_config *config, const usp_bootstrap *bootstrap,
                           usp_transport **transport);

/* Prints the sentence, with the rank, and returns 1 unless `good`. */
int usp_check(const usp_transport *transport, int good, const char *format, ...) __attribute__((format(printf, 3, 4)));

int usp_check_ok(const usp_transport *transport, usp_status status, const char *what);
/* Checks that `status` is the wanted one and that the last error contains `words`. */
int usp_check_failure(const usp_transport *transport, usp_status status, usp_status wanted, const char *words);

/* Waits until the stream is done. */
usp_status usp_drain(const usp_transport *transport, usp_stream stream);
/* Part of usp_check_transport, with a registered piece of at least 2048 bytes and as many as there are ranks. */
int usp_check_shared(usp_transport *transport, char *shared, usp_stream stream);

#endif
