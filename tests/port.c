/* port.c - a port that the system gave and took back. */
#define _GNU_SOURCE
#include "port.h"
#include <arpa/inet.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

int usp_free_port(void) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof address;
    int one = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (one < 0 || bind(one, (struct sockaddr *)&address, sizeof address) != 0) exit(1);
    getsockname(one, (struct sockaddr *)&address, &length);
    close(one);
    return ntohs(address.sin_port) < 60000 ? ntohs(address.sin_port) : 30000;
}
