/* port.c - eight ports in a row that nobody uses, below those that the system hands out (from 32768 on), so that no
 * connection of another program lands on one before it is taken. */
#define _GNU_SOURCE
#include "port.h"
#include <arpa/inet.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>

enum { USP_FIRST = 10000, USP_LAST = 32000, USP_ROW = 8, USP_TRIES = 1000 };

static int usp_is_free(int port) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    int one = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (one < 0) return 0;
    int reason = bind(one, (struct sockaddr *)&address, sizeof address);
    close(one);
    return reason == 0;
}

int usp_free_port(void) {
    for (int i = 0; i < USP_TRIES; i++) {
        unsigned chance;
        if (getrandom(&chance, sizeof chance, 0) != (ssize_t)sizeof chance) break;
        int port = USP_FIRST + (int)(chance % ((USP_LAST - USP_FIRST) / USP_ROW)) * USP_ROW, row = 0;
        while (row < USP_ROW && usp_is_free(port + row)) row++;
        if (row == USP_ROW) return port;
    }
    exit(1);
}
