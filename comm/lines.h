/* lines.h - connections between every two ranks of a world: where each rank listens, and how all call each other. */
#ifndef USP_LINES_H
#define USP_LINES_H
#include "door.h"

enum { USP_ADDRESS_IPS = 8, USP_MOST_LINES = 2 };

/* Where a rank listens, told to all others before anybody calls. */
typedef struct usp_address {
    uint64_t network; /* ranks with equal numbers reach each other over loopback */
    usp_key nonce;    /* rank 0's makes the key of all lines */
    int32_t near_port, far_port, ip_count;
    int32_t spare;
    usp_ip ips[USP_ADDRESS_IPS];
} usp_address;

/* A rank that listens: over loopback, and for other hosts. -1: not, or not any more. */
typedef struct usp_ears {
    int near, far;
} usp_ears;

/* Local: everything that can fail on one rank alone, done before ranks wait for each other. `near`: the own address on
 * the way to the others, NULL: not known. */
usp_status usp_lines_listen(usp_ears *ears, const usp_ip *near, usp_address *mine);
void usp_lines_deafen(usp_ears *ears);

/* The lines of one rank while they are made. Line i to `peer` is connections[peer * lines + i]; -1: not there yet. */
typedef struct usp_lines {
    int rank, size, lines;
    const usp_address *addresses; /* [size] */
    int *connections;
    usp_reception *reception;
    int listener;
    usp_door door; /* at which line i of a rank is "rank" rank * lines + i, and a rank listens as its line 0 */
} usp_lines;

/* Keeps the listener that the others will call: over loopback where all are on one host. The key of the lines is known
 * to those who know the secret, if there is one, and rank 0's nonce. */
void usp_lines_begin(usp_lines *lines, const usp_key *secret, usp_ears *ears);
/* Calls who is missing among the ranks before this one and hears those after it, for a short time. *missing: a rank
 * still to come, -1: none. A failure is one that waiting does not mend. */
usp_status usp_lines_round(usp_lines *lines, int round, int64_t deadline, int *missing);
/* Whether anything listens where `peer` does while it lives. */
int usp_lines_listens(const usp_lines *lines, int peer);

#endif
