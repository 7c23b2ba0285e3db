/* conformance.h - what every comm must do, checked from outside through its table. All ranks of the comm call the same
 * check with the same seed; each prints what it finds wrong and returns how many things that were. */
#ifndef USP_CONFORMANCE_H
#define USP_CONFORMANCE_H
#include "comm.h"

/* Exchanges of random lists in random sub-groups, gathers, shared memory. Leaves the comm as usable as before. */
int usp_check_comm(usp_comm *comm, unsigned seed);

/* Rank 0 sends rank 1 another size than it expects: COMM, both sizes named, nothing written. Leaves the comm failed.
 * For comms that can know; needs 2 ranks. */
int usp_check_comm_mismatch(usp_comm *comm);

/* Prints the sentence, with the rank, and returns 1 unless `good`. */
int usp_check(const usp_comm *comm, int good, const char *format, ...) __attribute__((format(printf, 3, 4)));

/* Checks that `status` is the wanted one and that the last error contains `words`. */
int usp_check_failure(const usp_comm *comm, usp_status status, usp_status wanted, const char *words);

#endif
