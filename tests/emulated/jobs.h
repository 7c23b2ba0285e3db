/* jobs.h - the order of jobs, checked without a kernel. */
#ifndef USP_TESTS_EMULATED_JOBS_H
#define USP_TESTS_EMULATED_JOBS_H
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* How many jobs do not come exactly once, forward, backward and in order, where heads have so many items of work, even
 * ones or not, and so many columns. */
int usp_emulated_jobs(int batch, int heads, int items, int even, int64_t columns);

#ifdef __cplusplus
}
#endif
#endif
