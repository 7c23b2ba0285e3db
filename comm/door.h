/* door.h - connections that only ranks of one job can open: who calls and who listens prove to each other that they
 * know the job's key, which is never sent. It hides nothing that is sent afterwards. */
#ifndef USP_DOOR_H
#define USP_DOOR_H
#include "hash.h"
#include "host.h"
#include "tcp.h"

/* A rank, as those see it who know its job's key. */
typedef struct usp_door {
    usp_key key;
    int rank, size;
} usp_door;

/* Room for those who have called and are not let in yet. They stay between two calls of usp_door_accept. */
typedef struct usp_reception usp_reception;

usp_status usp_reception_create(const usp_host *host, usp_reception **reception);
void usp_reception_destroy(usp_reception *reception); /* NULL is fine */

/* Calls `peer` and makes sure that it is. Until `patience` it must have proved to be there, until `deadline` it must
 * have let this rank in. TIMEOUT: it does not answer, and may be late. PEER_FAILED: nobody listens there, or another
 * program. COMM: this host cannot call. MISMATCH: the two do not agree on the size. INVALID: this rank came twice. */
usp_status usp_door_connect(const usp_door *door, const usp_ip *ip, int port, int peer, int64_t patience,
                            int64_t deadline, int *connection);
/* Lets all ranks first .. size - 1 in, into connections[rank]; others are turned away. TIMEOUT names the ranks that did
 * not come; those that came are kept. MISMATCH and INVALID as above, after a moment in which others still come and can
 * be told. COMM: this host can take no connection. */
usp_status usp_door_accept(const usp_door *door, usp_reception *reception, int listener, int first, int64_t deadline,
                           int *connections);

#endif
