/* tcp.c - TCP for the ranks of a world: addresses and interfaces, sockets, and transfers that end by a deadline. It
 * knows nothing of who is at the other end or what is sent, and starts no thread. */
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
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { USP_BACKLOG = 4096 }; /* the system takes what it allows */

static const char interface_variable[] = "USP_INTERFACE";

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

int usp_tcp_is_loopback(const usp_ip *ip) {
    const usp_ip one = {{[15] = 1}};
    return is_mapped(ip) ? ip->bytes[12] == 127 : memcmp(ip, &one, sizeof one) == 0;
}

/* ---- interfaces -------------------------------------------------------------------------------------------------- */

/* `list` as NCCL_SOCKET_IFNAME has it: prefixes of names between commas; after '=' whole names; '^' first: all others.
 */
static int is_listed(const char *list, const char *name) {
    int others = *list == '^', whole = list[others] == '=';
    list += others + whole;
    for (size_t length; *list; list += length + (list[length] == ',')) {
        length = strcspn(list, ",");
        if (length > 0 && strncmp(name, list, length) == 0 && (!whole || !name[length])) return !others;
    }
    return others;
}

/* Loopback only if it is asked for. */
static int is_chosen(const struct ifaddrs *interface, const char *list) {
    int named = list && *list != '^', loopback = (interface->ifa_flags & IFF_LOOPBACK) != 0;
    return (!list || is_listed(list, interface->ifa_name)) && (named || !loopback);
}

static int is_reachable(const struct ifaddrs *interface) {
    if (!interface->ifa_addr || !(interface->ifa_flags & IFF_UP)) return 0;
    if (interface->ifa_addr->sa_family == AF_INET) return 1;
    if (interface->ifa_addr->sa_family != AF_INET6) return 0;
    usp_ip ip = ip_of(interface->ifa_addr);
    return !IN6_IS_ADDR_LINKLOCAL((const struct in6_addr *)(const void *)ip.bytes);
}

static const char *interface_list(void) {
    const char *list = secure_getenv(interface_variable);
    return list && *list ? list : NULL;
}

int usp_tcp_interface_chosen(void) {
    return interface_list() != NULL;
}

usp_status usp_tcp_own_ips(usp_ip *ips, int capacity, int *count) {
    const char *list = interface_list();
    struct ifaddrs *interfaces;
    *count = 0;
    if (getifaddrs(&interfaces) != 0) return usp_fail(USP_COMM, "no list of interfaces: %s", strerror(errno));
    if (list) capacity = 1; /* who chooses wants no other */
    for (int v6 = 0; v6 < 2; v6++)
        for (struct ifaddrs *i = interfaces; i && *count < capacity; i = i->ifa_next)
            if (is_reachable(i) && is_chosen(i, list) && (i->ifa_addr->sa_family == AF_INET6) == v6)
                ips[(*count)++] = ip_of(i->ifa_addr);
    freeifaddrs(interfaces);
    if (*count > 0 || !list) return USP_OK;
    return usp_fail(USP_INVALID, "the variable %s is '%.80s': no such interface has an address", interface_variable,
                    list);
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

/* ---- sockets ----------------------------------------------------------------------------------------------------- */

static void send_at_once(int connection) {
    int one = 1;
    setsockopt(connection, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
}

static int open_socket(int family) {
    int descriptor = socket(family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (descriptor >= 0) send_at_once(descriptor);
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

usp_status usp_tcp_listen(const usp_ip *ip, int port, int *listener, int *bound) {
    const usp_ip any6 = {{0}}, any4 = {{[10] = 0xff, [11] = 0xff}};
    usp_ip chosen;
    int count;
    if (!ip && usp_tcp_interface_chosen()) {
        USP_TRY(usp_tcp_own_ips(&chosen, 1, &count));
        ip = &chosen;
    }
    *listener = listen_at(ip ? ip : &any6, port);
    if (*listener < 0 && !ip && errno != EADDRINUSE) *listener = listen_at(&any4, port); /* no IPv6 here */
    if (*listener < 0)
        return usp_fail(errno == EADDRINUSE ? USP_PEER_FAILED : USP_COMM, "cannot listen on port %d: %s", port,
                        strerror(errno));
    usp_tcp_near(*listener, &chosen, bound);
    return USP_OK;
}

void usp_tcp_near(int descriptor, usp_ip *ip, int *port) {
    struct sockaddr_storage address = {.ss_family = AF_INET};
    socklen_t length = sizeof address;
    getsockname(descriptor, (struct sockaddr *)&address, &length);
    *ip = ip_of((struct sockaddr *)&address);
    in_port_t at = address.ss_family == AF_INET ? ((struct sockaddr_in *)&address)->sin_port
                                                : ((struct sockaddr_in6 *)&address)->sin6_port;
    *port = ntohs(at);
}

int usp_tcp_dial(const usp_ip *ip, int port, int64_t deadline, int *connection) {
    struct sockaddr_storage address;
    socklen_t length = socket_address(ip, port, &address), size = sizeof(int);
    int descriptor = open_socket(address.ss_family), reason;
    if (descriptor < 0) return errno;
    reason = connect(descriptor, (struct sockaddr *)&address, length) == 0 ? 0 : errno;
    if (reason == EINPROGRESS) {
        reason = ETIMEDOUT;
        if (is_ready(descriptor, POLLOUT, deadline)) getsockopt(descriptor, SOL_SOCKET, SO_ERROR, &reason, &size);
    }
    if (reason == 0)
        *connection = descriptor;
    else
        close(descriptor);
    return reason;
}

/* Without a descriptor accept4() does not look whether anybody calls. */
int usp_tcp_take(int listener) {
    int connection = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK), reason = errno;
    if (connection >= 0) send_at_once(connection);
    if (connection < 0 && usp_tcp_exhausted(reason) && !is_ready(listener, POLLIN, 0)) reason = EAGAIN;
    errno = reason;
    return connection;
}

int usp_tcp_exhausted(int reason) {
    return reason == EMFILE || reason == ENFILE || reason == ENOBUFS || reason == ENOMEM;
}

int usp_tcp_is_gone(int connection) {
    char byte;
    ssize_t got = recv(connection, &byte, 1, MSG_PEEK);
    return got == 0 || (got < 0 && errno != EAGAIN && errno != EINTR);
}

void usp_tcp_close(int *connections, int count) {
    for (int i = 0; i < count; i++) {
        if (connections[i] >= 0) close(connections[i]);
        connections[i] = -1;
    }
}

void usp_tcp_part(int *connections, int count, int64_t deadline) {
    char unread;
    for (int i = 0; i < count; i++)
        if (connections[i] >= 0) shutdown(connections[i], SHUT_WR);
    for (int i = 0; i < count; i++)
        while (connections[i] >= 0 && usp_tcp_recv(connections[i], &unread, 1, deadline) == USP_OK) continue;
    usp_tcp_close(connections, count);
}
