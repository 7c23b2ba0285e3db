/* check_meeting.c - the first meeting of ranks where others are in the way: floods of callers that say nothing or
 * nonsense, programs on the ports, a job that is the same in everything, ranks that do not agree on their number. A
 * plain program; every rank is a process. */
#define _GNU_SOURCE
#include "conformance.h"
#include "environment.h"
#include "port.h"
#include "thread.h"
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum {
    USP_SECONDS = 100,
    USP_MOST = 6,
    USP_ATTACKERS = 4,
    USP_ATTACKS = 500, /* connections of each attacker at any time */
    USP_LIMIT_MS = 20000,
    USP_DELAY_MS = 2000 /* what others may cost */
};

/* How the ranks of a job come together. */
typedef struct usp_scene {
    int size, port;
    int sizes[USP_MOST]; /* what each rank believes; 0: size */
    const char *address;
    int nameless; /* others may know the address by another number */
    usp_status wanted;
    const char *words; /* of every rank's failure */
    int limit_ms;      /* each rank knows by then */
} usp_scene;

static void usp_rest(int milliseconds) {
    struct timespec time = {milliseconds / 1000, (long)(milliseconds % 1000) * 1000000L};
    nanosleep(&time, NULL);
}

static void usp_set(const char *name, int value) {
    char text[16];
    snprintf(text, sizeof text, "%d", value);
    setenv(name, text, 1);
}

static struct sockaddr_in usp_here(int port) {
    return (struct sockaddr_in){
        .sin_family = AF_INET, .sin_port = htons((uint16_t)port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
}

/* ---- ranks ------------------------------------------------------------------------------------------------------- */

static int usp_meet_as(const usp_scene *scene, int rank) {
    usp_world_config defaults = {.struct_size = sizeof defaults};
    usp_host host = usp_host_from_config(&defaults);
    usp_environment *environment;
    usp_set("RANK", rank), usp_set("WORLD_SIZE", scene->sizes[rank] ? scene->sizes[rank] : scene->size);
    usp_set("MASTER_PORT", scene->port);
    setenv("MASTER_ADDR", scene->address, 1);
    int64_t begin = usp_now_ms();
    usp_status status = usp_environment_open(&host, USP_LIMIT_MS, &environment);
    int took = (int)(usp_now_ms() - begin);
    int wrong = usp_check(NULL, took < scene->limit_ms, "rank %d took %d ms, not %d", rank, took, scene->limit_ms);
    if (scene->wanted != USP_OK) return wrong + usp_check_failure(NULL, status, scene->wanted, scene->words);
    if (usp_check(NULL, status == USP_OK, "rank %d: %s", rank, usp_last_error())) return 1;
    const usp_ip *near = usp_environment_bootstrap(environment).near;
    if (scene->nameless)
        wrong += usp_check(NULL, !near, "rank %d can be called over loopback alone", rank);
    else
        wrong += usp_check(NULL, near && usp_tcp_is_loopback(near), "rank %d is elsewhere", rank);
    usp_environment_close(environment);
    return wrong;
}

static pid_t usp_start(const usp_scene *scene, int rank) {
    fflush(stdout);
    pid_t child = fork();
    if (child != 0) return child;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    exit(usp_meet_as(scene, rank) != 0);
}

static int usp_end(pid_t child, const char *what) {
    int state = 1;
    waitpid(child, &state, 0);
    return usp_check(NULL, WIFEXITED(state) && WEXITSTATUS(state) == 0, "%s: a rank ended with state %d", what, state);
}

static int usp_play(const usp_scene *scene, const char *what) {
    pid_t children[USP_MOST];
    int wrong = 0;
    for (int rank = 0; rank < scene->size; rank++) children[rank] = usp_start(scene, rank);
    for (int rank = 0; rank < scene->size; rank++) wrong += usp_end(children[rank], what);
    return wrong;
}

/* ---- floods ------------------------------------------------------------------------------------------------------ */

/* What the callers of a flood say. */
typedef enum usp_talk { USP_SILENT, USP_GARBAGE, USP_FORGED, USP_TALKS } usp_talk;

static int usp_attack(int port, usp_talk talk) {
    const struct {
        char magic[8];
        int32_t from, to, size, port;
        char nonce[16];
    } greeting = {{'u', 's', 'p', ' ', 't', 'c', 'p', '2'}, 1, 0, 4, port, "any"};
    const struct sockaddr_in address = usp_here(port);
    int descriptor = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (descriptor < 0) return -1;
    connect(descriptor, (const struct sockaddr *)&address, sizeof address);
    if (talk == USP_GARBAGE) send(descriptor, "GET / HTTP/1.0\r\n\r\n", 18, MSG_NOSIGNAL);
    if (talk == USP_FORGED) send(descriptor, &greeting, sizeof greeting, MSG_NOSIGNAL);
    return descriptor;
}

/* Holds as many connections as it can; who is turned away comes again at once. */
static void usp_flood(int port) {
    struct pollfd polls[USP_ATTACKS];
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    for (int i = 0; i < USP_ATTACKS; i++) polls[i] = (struct pollfd){usp_attack(port, i % USP_TALKS), POLLIN, 0};
    for (;;) {
        poll(polls, USP_ATTACKS, 100);
        for (int i = 0; i < USP_ATTACKS; i++) {
            char byte[64];
            if (polls[i].fd >= 0 && !polls[i].revents) continue;
            if (polls[i].fd >= 0 && recv(polls[i].fd, byte, sizeof byte, 0) > 0) continue;
            if (polls[i].fd >= 0) close(polls[i].fd);
            polls[i].fd = usp_attack(port, i % USP_TALKS);
        }
    }
}

static int usp_check_flood(void) {
    usp_scene scene = {.size = 4, .port = usp_free_port(), .address = "127.0.0.1", .limit_ms = USP_DELAY_MS};
    pid_t attackers[USP_ATTACKERS];
    for (int i = 0; i < USP_ATTACKERS; i++) {
        attackers[i] = fork();
        if (attackers[i] == 0) usp_flood(scene.port);
    }
    usp_rest(300);
    int wrong = 0;
    for (int round = 0; round < 3; round++) wrong += usp_play(&scene, "a flood");
    for (int i = 0; i < USP_ATTACKERS; i++) {
        kill(attackers[i], SIGKILL);
        waitpid(attackers[i], NULL, 0);
    }
    return wrong;
}

/* ---- others at the ports ----------------------------------------------------------------------------------------- */

/* A port of which nobody uses any of the eight from it on, as connections just closed do: all are held for now. */
static int usp_hold_ports(int holders[8]) {
    const usp_ip loopback = {{[10] = 0xff, [11] = 0xff, [12] = 127, [15] = 1}};
    for (;;) {
        int port = usp_free_port(), held = 0, bound;
        while (held < 8 && usp_tcp_listen(&loopback, port + held, &holders[held], &bound) == USP_OK) held++;
        if (held == 8) return port;
        usp_tcp_close(holders, held);
    }
}

/* Programs that take every call and say nothing hold all ports but the last. */
static int usp_check_held(void) {
    int holders[8];
    usp_scene scene = {.size = 3, .port = usp_hold_ports(holders), .address = "localhost", .limit_ms = USP_DELAY_MS};
    usp_tcp_close(&holders[7], 1);
    int wrong = usp_play(&scene, "held ports");
    usp_tcp_close(holders, 7);
    return wrong;
}

/* Two ranks 0 of jobs that are the same in everything, and nobody else: each hears of the other. */
static int usp_check_twins(void) {
    usp_scene scene = {.size = 2, .port = usp_free_port(), .address = "127.0.0.1", .limit_ms = USP_DELAY_MS + 300};
    scene.wanted = USP_INVALID;
    scene.words = "rank 0 came twice: two jobs have the same name, address and port";
    pid_t one = usp_start(&scene, 0);
    usp_rest(300);
    pid_t other = usp_start(&scene, 0);
    return usp_end(one, "a twin") + usp_end(other, "the other twin");
}

/* One of four ranks, in turn, is wrong about their number: all are told both. */
static int usp_check_sizes(void) {
    usp_scene alone = {.size = 4, .port = usp_free_port(), .address = "127.0.0.1", .limit_ms = USP_DELAY_MS};
    alone.sizes[0] = 2;
    alone.wanted = USP_MISMATCH;
    alone.words = "says the job has 4 ranks, rank 0 says 2";
    int wrong = usp_play(&alone, "rank 0's size");
    for (int odd = 1; odd < 4; odd++) {
        char words[64];
        usp_scene scene = {.size = 4, .port = usp_free_port(), .address = "127.0.0.1", .limit_ms = USP_DELAY_MS};
        scene.sizes[odd] = odd == 3 ? 7 : odd + 2 + (odd == 2);
        scene.wanted = USP_MISMATCH;
        scene.words = words;
        snprintf(words, sizeof words, "rank %d says the job has %d ranks, rank 0 says 4", odd, scene.sizes[odd]);
        wrong += usp_play(&scene, "sizes");
    }
    return wrong;
}

/* ---- where rank 0 listens ---------------------------------------------------------------------------------------- */

/* At the announced address and nowhere else: another address of the same port stays free for others. */
static int usp_check_address(void) {
    const usp_ip other = {{[10] = 0xff, [11] = 0xff, [12] = 127, [15] = 9}};
    usp_scene scene = {.size = 2, .port = usp_free_port(), .address = "127.0.0.1", .limit_ms = USP_DELAY_MS};
    int listener = -1, bound, connection = -1;
    pid_t host = usp_start(&scene, 0);
    usp_rest(200);
    int reason = usp_tcp_dial(&other, scene.port, usp_tcp_deadline(1000), &connection);
    int wrong = usp_check(NULL, reason == ECONNREFUSED, "rank 0 listens at 127.0.0.9 too");
    usp_status status = usp_tcp_listen(&other, scene.port, &listener, &bound);
    wrong += usp_check(NULL, status == USP_OK, "%s", usp_last_error());
    usp_tcp_close(&listener, 1);
    usp_tcp_close(&connection, 1);
    return wrong + usp_end(usp_start(&scene, 1), "address") + usp_end(host, "address");
}

static int usp_check_brackets(void) {
    usp_scene scene = {.size = 2, .port = usp_free_port(), .address = "[::1]", .limit_ms = USP_DELAY_MS};
    const usp_ip loopback = {{[15] = 1}};
    int listener, port;
    if (usp_tcp_listen(&loopback, 0, &listener, &port) != USP_OK) return 0; /* no IPv6 here */
    close(listener);
    return usp_play(&scene, "brackets");
}

/* A name that means loopback on this host, and need not on another. */
static int usp_check_name(void) {
    usp_scene scene = {.size = 3, .port = usp_free_port(), .address = "LOCALHOST", .limit_ms = USP_DELAY_MS};
    scene.nameless = 1;
    return usp_play(&scene, "a name");
}

int main(void) {
    alarm(USP_SECONDS);
    unsetenv("USP_JOB_TOKEN");
    int wrong = usp_check_flood() + usp_check_held() + usp_check_twins() + usp_check_sizes();
    wrong += usp_check_address() + usp_check_brackets() + usp_check_name();
    printf("%s: %d wrong\n", wrong ? "FAIL" : "ok", wrong);
    return wrong != 0;
}
