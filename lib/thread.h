/* thread.h - threads that the library starts in the program's process. */
#ifndef USP_THREAD_H
#define USP_THREAD_H
#include <pthread.h>

/* As pthread_create, but the thread takes none of the program's signals, which may be meant for a sigwait. */
int usp_thread_start(pthread_t *thread, void *(*body)(void *), void *argument);

#endif
