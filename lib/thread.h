/* thread.h - the library's own threads, and how any of its threads waits: a clock, a pause. */
#ifndef USP_THREAD_H
#define USP_THREAD_H
#include <pthread.h>
#include <stdint.h>

/* As pthread_create, but the thread takes none of the program's signals, which may be meant for a sigwait. */
int usp_thread_start(pthread_t *thread, void *(*body)(void *), void *argument);

/* Milliseconds of the monotonic clock. */
int64_t usp_now_ms(void);

/* Between two looks at something; `round` counts them from 0. Short at first, since most answers take microseconds. */
void usp_pause(int round);

#endif
