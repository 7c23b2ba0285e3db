/* tcp.h - TCP among the ranks of a world: connections that only ranks of one world can open, and transfers that end by
 * a deadline. No call raises a signal; every descriptor is non-blocking and closed on exec. */
#ifndef USP_TCP_H
#define USP_TCP_H
#include "usp.h"

/* IPv6, or IPv4 in its mapped form. */
typedef struct usp_ip {
    unsigned char bytes[16];
} usp_ip;

/* Keeps strangers out: what both ends of a connection must know. No protection against a reader of the network. */
typedef struct usp_token {
    unsigned char bytes[16];
} usp_token;

/* Deadlines are of usp_now_ms(); -1 never comes. */
int64_t usp_tcp_deadline(int timeout_ms);
int usp_tcp_left(int64_t deadline); /* as poll() wants it */

/* The addresses of a host's name or number; at least one, or INVALID. */
usp_status usp_tcp_resolve(const char *name, usp_ip *ips, int capacity, int *count);
/* This host's addresses as others may reach it, IPv4 first; how many. */
int usp_tcp_own_ips(usp_ip *ips, int capacity);
/* `ip` NULL: all addresses. Port 0: any; *bound is the port. */
usp_status usp_tcp_listen(const usp_ip *ip, int port, int *listener, int *bound);
/* 0 if something listens there, else the errno of the call: ECONNREFUSED if nothing does. */
int usp_tcp_probe(const usp_ip *ip, int port, int64_t deadline);
/* Connects as `rank` to `peer` and makes sure that it is. TIMEOUT if it does not answer: it may be late. */
usp_status usp_tcp_connect(const usp_ip *ip, int port, const usp_token *token, int rank, int peer, int64_t deadline,
                           int *connection);
/* Takes the connections of all ranks first .. size - 1 into connections[rank]; others are refused. TIMEOUT names the
 * ranks that did not come; those that came are kept. */
usp_status usp_tcp_accept(int listener, const usp_token *token, int rank, int first, int size, int64_t deadline,
                          int *connections);
/* All of it. TIMEOUT, or COMM if the other end closed. */
usp_status usp_tcp_send(int connection, const void *data, size_t bytes, int64_t deadline);
usp_status usp_tcp_recv(int connection, void *data, size_t bytes, int64_t deadline);

void usp_tcp_close(int *connections, int count); /* those that are not -1 */

#endif
