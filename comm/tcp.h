/* tcp.h - TCP for the ranks of a world: addresses and interfaces, sockets, and transfers that end by a deadline. No
 * call raises a signal; every descriptor is non-blocking and closed on exec. Who is at the other end: door.h. */
#ifndef USP_TCP_H
#define USP_TCP_H
#include "usp.h"

/* IPv6, or IPv4 in its mapped form. */
typedef struct usp_ip {
    unsigned char bytes[16];
} usp_ip;

/* Deadlines are of usp_now_ms(); -1 never comes. */
int64_t usp_tcp_deadline(int timeout_ms);
int usp_tcp_left(int64_t deadline); /* as poll() wants it */

/* The addresses of a host's name or number; at least one, or INVALID. */
usp_status usp_tcp_resolve(const char *name, usp_ip *ips, int capacity, int *count);
int usp_tcp_is_loopback(const usp_ip *ip);
/* This host's addresses as others may reach it, IPv4 first, none perhaps; or the one that the variable USP_INTERFACE
 * chooses, INVALID if there is none. */
usp_status usp_tcp_own_ips(usp_ip *ips, int capacity, int *count);
int usp_tcp_interface_chosen(void); /* whether it is set */

/* `ip` NULL: what USP_INTERFACE chooses, else all addresses. Port 0: any; *bound is the port. PEER_FAILED: somebody
 * else listens there. */
usp_status usp_tcp_listen(const usp_ip *ip, int port, int *listener, int *bound);
/* The own end of a connection or listener. */
void usp_tcp_near(int descriptor, usp_ip *ip, int *port);
/* 0, or the errno of why not; ETIMEDOUT at the deadline. */
int usp_tcp_dial(const usp_ip *ip, int port, int64_t deadline, int *connection);
int usp_tcp_take(int listener); /* the next who has called, or -1 with errno */
/* Whether an errno of dial or take means that this host has no room for connections: waiting does not help. */
int usp_tcp_exhausted(int reason);
int usp_tcp_is_gone(int connection); /* its other end has closed it */

/* All of it. TIMEOUT, or COMM if the other end closed. */
usp_status usp_tcp_send(int connection, const void *data, size_t bytes, int64_t deadline);
usp_status usp_tcp_recv(int connection, void *data, size_t bytes, int64_t deadline);

void usp_tcp_close(int *connections, int count); /* those that are not -1 */
/* The same, once the other ends have read what was sent and closed theirs, or at the deadline. (A close throws away
 * what is on its way to an end whose own words were not read.) */
void usp_tcp_part(int *connections, int count, int64_t deadline);

#endif
