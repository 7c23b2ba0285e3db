/* tcp.c - TCP among the ranks of a world: connections that only ranks of one world can open, and transfers that end by
 * a deadline. It knows nothing of what is sent, and starts no thread. */
#define _GNU_SOURCE
#include "tcp.h"
#include "error.h"
#include "thread.h"
#include <arpa/inet.h>
#include <errno.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum {
    USP_BACKLOG = 1024,
    USP_CALLERS = 16,
    USP_PATIENCE_MS = 500, /* for a caller to say who it is */
    USP_NAP_MS = 10        /* after a call that could not be taken */
};

static const char hello_magic[8] = {'u', 's', 'p', ' ', 't', 'c', 'p', '1'};

/* What each end of a connection says first. */
typedef struct usp_hello {
    char magic[8];
    usp_token token;
    int32_t from, to;
} usp_hello;

/* ---- time -------------------------------------------------------------------------------------------------------- */

int64_t usp_tcp_deadline(int timeout_ms) {
    return timeout_ms < 0 ? -1 : usp_now_ms() + timeout_ms;
}

int usp_tcp_left(int64_t deadline) {
    if (deadline < 0) return -1;
    int64_t left = deadline - usp_now_ms();
    return left < 0 ? 0 : (int)left;
}

/* 1 once one of `events` or an error is there, 0 at the deadline. */
static int is_ready(int descriptor, short events, int64_t deadline) {
    struct pollfd one = {.fd = descriptor, .events = events};
    int ready;
    do ready = poll(&one, 1, usp_tcp_left(deadline));
    while (ready < 0 && errno == EINTR);
    return ready > 0;
}

/* ---- addresses --------------------------------------------------------------------------------------------------- */

static int is_mapped(const usp_ip *ip) {
    return IN6_IS_ADDR_V4MAPPED((const struct in6_addr *)(const void *)ip->bytes);
}

static socklen_t socket_address(const usp_ip *ip, int port, struct sockaddr_storage *address) {
    memset(address, 0, sizeof *address);
    if (is_mapped(ip)) {
        struct sockaddr_in *v4 = (struct sockaddr_in *)address;
        v4->sin_family = AF_INET;
        v4->sin_port = htons((uint16_t)port);
        memcpy(&v4->sin_addr, ip->bytes + 12, 4);
        return sizeof *v4;
    }
    struct sockaddr_in6 *v6 = (struct sockaddr_in6 *)address;
    v6->sin6_family = AF_INET6;
    v6->sin6_port = htons((uint16_t)port);
    memcpy(&v6->sin6_addr, ip->bytes, 16);
    return sizeof *v6;
}

static usp_ip ip_of(const struct sockaddr *address) {
    usp_ip ip = {{[10] = 0xff, [11] = 0xff}};
    if (address->sa_family == AF_INET)
        memcpy(ip.bytes + 12, &((const struct sockaddr_in *)(const void *)address)->sin_addr, 4);
    else
        memcpy(ip.bytes, &((const struct sockaddr_in6 *)(const void *)address)->sin6_addr, 16);
    return ip;
}

static int is_reachable(const struct ifaddrs *interface) {
    if (!interface->ifa_addr || !(interface->ifa_flags & IFF_UP) || (interface->ifa_flags & IFF_LOOPBACK)) return 0;
    if (interface->ifa_addr->sa_family == AF_INET) return 1;
    if (interface->ifa_addr->sa_family != AF_INET6) return 0;
    usp_ip ip = ip_of(interface->ifa_addr);
    return !IN6_IS_ADDR_LINKLOCAL((const struct in6_addr *)(const void *)ip.bytes);
}

int usp_tcp_own_ips(usp_ip *ips, int capacity) {
    struct ifaddrs *interfaces;
    int count = 0;
    if (getifaddrs(&interfaces) != 0) return 0;
    for (int v6 = 0; v6 < 2; v6++)
        for (struct ifaddrs *i = interfaces; i && count < capacity; i = i->ifa_next)
            if (is_reachable(i) && (i->ifa_addr->sa_family == AF_INET6) == v6) ips[count++] = ip_of(i->ifa_addr);
    freeifaddrs(interfaces);
    return count;
}

usp_status usp_tcp_resolve(const char *name, usp_ip *ips, int capacity, int *count) {
    const struct addrinfo wanted = {.ai_socktype = SOCK_STREAM};
    struct addrinfo *found;
    *count = 0;
    int reason = getaddrinfo(name, NULL, &wanted, &found);
    if (reason != 0) return usp_fail(USP_INVALID, "no address for the host '%.80s': %s", name, gai_strerror(reason));
    for (const struct addrinfo *i = found; i && *count < capacity; i = i->ai_next)
        if (i->ai_family == AF_INET || i->ai_family == AF_INET6) ips[(*count)++] = ip_of(i->ai_addr);
    freeaddrinfo(found);
    return *count > 0 ? USP_OK : usp_fail(USP_INVALID, "no address for the host '%.80s'", name);
}

/* ---- transfers --------------------------------------------------------------------------------------------------- */

static usp_status transfer_failed(ssize_t moved, short events, int connection, int64_t deadline) {
    if (moved < 0 && errno == EINTR) return USP_OK;
    if (moved == 0 || (errno != EAGAIN && errno != EWOULDBLOCK))
        return usp_fail(USP_COMM, "the connection ended: %s", moved == 0 ? "closed" : strerror(errno));
    return is_ready(connection, events, deadline) ? USP_OK : usp_fail(USP_TIMEOUT, "the connection is silent");
}

usp_status usp_tcp_send(int connection, const void *data, size_t bytes, int64_t deadline) {
    for (size_t done = 0; done < bytes;) {
        ssize_t sent = send(connection, (const char *)data + done, bytes - done, MSG_NOSIGNAL);
        if (sent > 0)
            done += (size_t)sent;
        else
            USP_TRY(transfer_failed(sent, POLLOUT, connection, deadline));
    }
    return USP_OK;
}

usp_status usp_tcp_recv(int connection, void *data, size_t bytes, int64_t deadline) {
    for (size_t done = 0; done < bytes;) {
        ssize_t got = recv(connection, (char *)data + done, bytes - done, 0);
        if (got > 0)
            done += (size_t)got;
        else
            USP_TRY(transfer_failed(got, POLLIN, connection, deadline));
    }
    return USP_OK;
}

/* ---- listen, connect, accept ------------------------------------------------------------------------------------- */

static int open_socket(int family) {
    int descriptor = socket(family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0), one = 1;
    if (descriptor >= 0) setsockopt(descriptor, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    return descriptor;
}

/* A listening socket at the address, or -1 with errno. */
static int listen_at(const usp_ip *ip, int port) {
    struct sockaddr_storage address;
    socklen_t length = socket_address(ip, port, &address);
    int listener = open_socket(address.ss_family), one = 1, zero = 0;
    if (listener < 0) return -1;
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (address.ss_family == AF_INET6) setsockopt(listener, IPPROTO_IPV6, IPV6_V6ONLY, &zero, sizeof zero);
    if (bind(listener, (struct sockaddr *)&address, length) == 0 && listen(listener, USP_BACKLOG) == 0) return listener;
    int reason = errno;
    close(listener);
    errno = reason;
    return -1;
}

static int bound_port(int listener) {
    struct sockaddr_storage address = {0};
    socklen_t length = sizeof address;
    getsockname(listener, (struct sockaddr *)&address, &length);
    if (address.ss_family == AF_INET) return ntohs(((struct sockaddr_in *)&address)->sin_port);
    return ntohs(((struct sockaddr_in6 *)&address)->sin6_port);
}

usp_status usp_tcp_listen(const usp_ip *ip, int port, int *listener, int *bound) {
    const usp_ip any6 = {{0}}, any4 = {{[10] = 0xff, [11] = 0xff}};
    *listener = listen_at(ip ? ip : &any6, port);
    if (*listener < 0 && !ip && errno != EADDRINUSE) *listener = listen_at(&any4, port); /* no IPv6 here */
    if (*listener < 0) return usp_fail(USP_COMM, "cannot listen on port %d: %s", port, strerror(errno));
    *bound = bound_port(*listener);
    return USP_OK;
}

/* Takes the same time for every wrong token. */
static int hello_right(const usp_hello *hello, const usp_token *token, int to) {
    unsigned difference = 0;
    for (size_t i = 0; i < sizeof token->bytes; i++) difference |= (unsigned)(hello->token.bytes[i] ^ token->bytes[i]);
    return difference == 0 && memcmp(hello->magic, hello_magic, sizeof hello_magic) == 0 && hello->to == to;
}

static usp_hello hello_make(const usp_token *token, int from, int to) {
    usp_hello hello = {.token = *token, .from = from, .to = to};
    memcpy(hello.magic, hello_magic, sizeof hello_magic);
    return hello;
}

static usp_status introduce(int connection, const usp_token *token, int rank, int peer, int64_t deadline) {
    usp_hello hello = hello_make(token, rank, peer), answer;
    usp_status status = usp_tcp_send(connection, &hello, sizeof hello, deadline);
    if (status == USP_OK) status = usp_tcp_recv(connection, &answer, sizeof answer, deadline);
    if (status != USP_OK) return usp_fail(USP_TIMEOUT, "rank %d does not answer", peer);
    if (hello_right(&answer, token, rank) && answer.from == peer) return USP_OK;
    return usp_fail(USP_COMM, "another program answers in place of rank %d", peer);
}

/* 0 once the other end has taken the call, else why not. */
static int finish_call(int descriptor, int reason, int64_t deadline) {
    socklen_t size = sizeof reason;
    if (reason != EINPROGRESS) return reason;
    if (!is_ready(descriptor, POLLOUT, deadline)) return ETIMEDOUT;
    getsockopt(descriptor, SOL_SOCKET, SO_ERROR, &reason, &size);
    return reason;
}

int usp_tcp_probe(const usp_ip *ip, int port, int64_t deadline) {
    struct sockaddr_storage address;
    socklen_t length = socket_address(ip, port, &address);
    int descriptor = open_socket(address.ss_family);
    if (descriptor < 0) return errno;
    int reason = connect(descriptor, (struct sockaddr *)&address, length) == 0 ? 0 : errno;
    reason = finish_call(descriptor, reason, deadline);
    close(descriptor);
    return reason;
}

usp_status usp_tcp_connect(const usp_ip *ip, int port, const usp_token *token, int rank, int peer, int64_t deadline,
                           int *connection) {
    struct sockaddr_storage address;
    socklen_t length = socket_address(ip, port, &address);
    int descriptor = open_socket(address.ss_family), reason = errno;
    if (descriptor < 0) return usp_fail(USP_COMM, "no socket: %s", strerror(reason));
    reason = connect(descriptor, (struct sockaddr *)&address, length) == 0 ? 0 : errno;
    reason = finish_call(descriptor, reason, deadline);
    usp_status status = reason == 0 ? introduce(descriptor, token, rank, peer, deadline)
                                    : usp_fail(reason == ETIMEDOUT ? USP_TIMEOUT : USP_COMM,
                                               "cannot connect to rank %d: %s", peer, strerror(reason));
    if (status == USP_OK)
        *connection = descriptor;
    else
        close(descriptor);
    return status;
}

/* Somebody who has connected and not yet said who it is. */
typedef struct usp_caller {
    int descriptor; /* -1: free */
    int64_t since;
    size_t heard;
    usp_hello hello;
} usp_caller;

typedef struct usp_reception {
    const usp_token *token;
    int rank, first, size;
    int *connections;
    usp_caller callers[USP_CALLERS];
} usp_reception;

static void dismiss(usp_caller *caller) {
    if (caller->descriptor >= 0) close(caller->descriptor);
    caller->descriptor = -1;
}

/* Who has given up waiting for an answer will call again. */
static int is_gone(const usp_caller *caller) {
    char byte;
    return recv(caller->descriptor, &byte, 1, MSG_PEEK) == 0;
}

/* Where a rank calls twice, it has given its first connection up. */
static void seat_caller(usp_reception *reception, usp_caller *caller) {
    int from = caller->hello.from;
    int welcome = hello_right(&caller->hello, reception->token, reception->rank) && from >= reception->first &&
                  from < reception->size;
    usp_hello answer = hello_make(reception->token, reception->rank, from);
    if (!welcome || is_gone(caller) ||
        send(caller->descriptor, &answer, sizeof answer, MSG_NOSIGNAL) != (ssize_t)sizeof answer) {
        dismiss(caller);
        return;
    }
    if (reception->connections[from] >= 0) close(reception->connections[from]);
    reception->connections[from] = caller->descriptor;
    caller->descriptor = -1;
}

static void listen_to_caller(usp_reception *reception, usp_caller *caller) {
    char *room = (char *)&caller->hello + caller->heard;
    ssize_t got = recv(caller->descriptor, room, sizeof caller->hello - caller->heard, 0);
    if (got < 0 && (errno == EAGAIN || errno == EINTR)) return;
    if (got <= 0) {
        dismiss(caller);
        return;
    }
    caller->heard += (size_t)got;
    if (caller->heard == sizeof caller->hello) seat_caller(reception, caller);
}

/* A free place, or that of the one who has been here for longest, if that was time enough to say who it is; NULL: none
 * yet. Many ranks may call at once, and each may be slow to speak. */
static usp_caller *find_place(usp_reception *reception) {
    usp_caller *oldest = &reception->callers[0];
    for (int i = 0; i < USP_CALLERS; i++) {
        usp_caller *caller = &reception->callers[i];
        if (caller->descriptor < 0) return caller;
        if (caller->since < oldest->since) oldest = caller;
    }
    return usp_now_ms() - oldest->since >= USP_PATIENCE_MS ? oldest : NULL;
}

/* A call that cannot be taken, for want of descriptors, stays: the next look at it must not come at once. */
static void take_call(usp_caller *place, int listener) {
    int descriptor = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK), one = 1;
    if (descriptor < 0) {
        poll(NULL, 0, USP_NAP_MS);
        return;
    }
    setsockopt(descriptor, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    dismiss(place);
    *place = (usp_caller){.descriptor = descriptor, .since = usp_now_ms()};
}

static int count_missing(const usp_reception *reception) {
    int missing = 0;
    for (int i = reception->first; i < reception->size; i++) missing += reception->connections[i] < 0;
    return missing;
}

static usp_status name_missing(const usp_reception *reception) {
    char ranks[160];
    size_t length = 0;
    for (int i = reception->first; i < reception->size && length + 16 < sizeof ranks; i++)
        if (reception->connections[i] < 0)
            length += (size_t)snprintf(ranks + length, sizeof ranks - length, "%s%d", length ? ", " : "", i);
    return usp_fail(USP_TIMEOUT, "%d rank(s) did not connect in time: %s", count_missing(reception), ranks);
}

/* One round of whatever has come. */
static void receive_calls(usp_reception *reception, int listener, int64_t deadline) {
    struct pollfd polls[USP_CALLERS + 1];
    usp_caller *place = find_place(reception);
    int left = usp_tcp_left(deadline);
    if (!place && (left < 0 || left > USP_PATIENCE_MS)) left = USP_PATIENCE_MS;
    for (int i = 0; i < USP_CALLERS; i++)
        polls[i] = (struct pollfd){.fd = reception->callers[i].descriptor, .events = POLLIN};
    polls[USP_CALLERS] = (struct pollfd){.fd = place ? listener : -1, .events = POLLIN};
    if (poll(polls, USP_CALLERS + 1, left) <= 0) return;
    for (int i = 0; i < USP_CALLERS; i++)
        if (polls[i].revents) listen_to_caller(reception, &reception->callers[i]);
    if (polls[USP_CALLERS].revents) take_call(place, listener);
}

usp_status usp_tcp_accept(int listener, const usp_token *token, int rank, int first, int size, int64_t deadline,
                          int *connections) {
    usp_reception reception = {token, rank, first, size, connections, {{0}}};
    for (int i = 0; i < USP_CALLERS; i++) reception.callers[i].descriptor = -1;
    while (count_missing(&reception) > 0 && usp_tcp_left(deadline) != 0) receive_calls(&reception, listener, deadline);
    for (int i = 0; i < USP_CALLERS; i++) dismiss(&reception.callers[i]);
    return count_missing(&reception) > 0 ? name_missing(&reception) : USP_OK;
}

void usp_tcp_close(int *connections, int count) {
    for (int i = 0; i < count; i++) {
        if (connections[i] >= 0) close(connections[i]);
        connections[i] = -1;
    }
}
