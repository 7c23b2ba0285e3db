/* crew.h - ranks that a test program starts itself: threads that meet over memory, or processes of its own executable,
 * which find each other by a launcher's variables. */
#ifndef USP_TESTS_CREW_H
#define USP_TESTS_CREW_H
#include <pthread.h>
#include <sys/types.h>

#include "usp.h"

enum { USP_CREW_MOST = 64 };

/* A thread of a crew, and what its main function gets. */
typedef struct usp_hand {
    struct usp_crew *crew;
    int rank, size;
    int failed; /* for its main function to say */
    pthread_t thread;
} usp_hand;

/* Runs `main` on so many threads; how many have failed. */
int usp_crew_threads(int size, void (*main)(usp_hand *));
/* An all-gather over the threads of a crew; `hand`: the calling one's usp_hand. */
usp_status usp_crew_gather(void *hand, const void *mine, void *all, size_t bytes_per_rank);

/* Starts so many processes with the option (NULL: none); -1 in `ranks` where one could not be. */
void usp_crew_processes(int size, const char *option, pid_t *ranks);

#endif
