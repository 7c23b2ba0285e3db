/* check_door.c - who is let in between ranks, and what strangers, squatters and eavesdroppers get: nothing. With the
 * hash and the filter of text that it rests on, and the choice of interfaces. A plain program; forks and threads. */
#define _GNU_SOURCE
#include "conformance.h"
#include "door.h"
#include "text.h"
#include "thread.h"
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { USP_MOST = 201, USP_SECONDS = 100, USP_SOON_MS = 3000 };

static const usp_ip usp_loopback = {{[10] = 0xff, [11] = 0xff, [12] = 127, [15] = 1}};
static const usp_key usp_job = {"the key of a jo"}, usp_other_job = {"the key of one"};

static void usp_rest(int milliseconds) {
    struct timespec time = {milliseconds / 1000, (long)(milliseconds % 1000) * 1000000L};
    nanosleep(&time, NULL);
}

/* ---- the hash and the filter ------------------------------------------------------------------------------------- */

/* The paper's own example, and the authors' first vector. */
static int usp_check_hash(void) {
    usp_key key;
    unsigned char message[15];
    for (int i = 0; i < 16; i++) key.bytes[i] = (unsigned char)i;
    for (int i = 0; i < 15; i++) message[i] = (unsigned char)i;
    uint64_t of_paper = usp_hash_keyed(&key, message, 15), of_none = usp_hash_keyed(&key, message, 0);
    int wrong =
        usp_check(NULL, of_paper == UINT64_C(0xa129ca6149be45e5), "SipHash gives %llx", (unsigned long long)of_paper);
    return wrong + usp_check(NULL, of_none == UINT64_C(0x726fdb47dd0e0e31), "SipHash of nothing gives %llx",
                             (unsigned long long)of_none);
}

static int usp_check_text(void) {
    static const char *const pairs[][2] = {
        {"rank 1 died: caf\xc3\xa9 \xe2\x82\xac \xf0\x9f\x98\x80",
         "rank 1 died: caf\xc3\xa9 \xe2\x82\xac \xf0\x9f\x98\x80"},
        {"\x1b[2J\x1b]0;title\x07 a\nb\r\tc\x7f", "?[2J?]0;title? a?b??c?"},
        {"C1 \xc2\x9b[31m", "C1 ??[31m"},                     /* a control sequence in one character */
        {"\xc0\xaf \xe0\x80\xaf \xed\xa0\x80", "?? ??? ???"}, /* too long; half of a pair */
        {"\xf5\x80\x80\x80 \xf4\x90\x80\x80", "???? ????"},   /* beyond the last character */
        {"\xe2\x80\xae txt", "??? txt"},                      /* writes from right to left */
        {"cut off \xe2\x82", "cut off ??"},
        {"", ""}};
    int wrong = 0;
    for (size_t i = 0; i < sizeof pairs / sizeof *pairs; i++) {
        char text[64];
        snprintf(text, sizeof text, "%s", pairs[i][0]);
        usp_text_clean(text, sizeof text);
        wrong += usp_check(NULL, strcmp(text, pairs[i][1]) == 0, "text %zu became '%s'", i, text);
    }
    char endless[8] = {'e', 'n', 'd', 'l', 'e', 's', 's', '!'};
    usp_text_clean(endless, sizeof endless);
    return wrong + usp_check(NULL, strcmp(endless, "endless") == 0, "no end");
}

/* ---- a rank that listens, in a thread of its own ----------------------------------------------------------------- */

typedef struct usp_keeper {
    usp_host host;
    usp_door door;
    usp_reception *reception;
    int listener, port, timeout_ms;
    int connections[USP_MOST];
    pthread_t thread;
    usp_status status;
    char sentence[256];
    int64_t took;
} usp_keeper;

static void *usp_keep(void *argument) {
    usp_keeper *keeper = argument;
    int64_t begin = usp_now_ms(), deadline = usp_tcp_deadline(keeper->timeout_ms);
    keeper->status =
        usp_door_accept(&keeper->door, keeper->reception, keeper->listener, 1, deadline, keeper->connections);
    keeper->took = usp_now_ms() - begin;
    snprintf(keeper->sentence, sizeof keeper->sentence, "%s", usp_last_error());
    usp_reception_destroy(keeper->reception);
    return NULL;
}

/* Rank 0 of `size` begins to listen. */
static usp_keeper *usp_keeper_start(int size, int timeout_ms) {
    usp_world_config defaults = {.struct_size = sizeof defaults};
    usp_keeper *keeper = calloc(1, sizeof *keeper);
    if (!keeper) exit(1);
    keeper->host = usp_host_from_config(&defaults);
    keeper->door = (usp_door){usp_job, 0, size};
    keeper->timeout_ms = timeout_ms;
    memset(keeper->connections, -1, sizeof keeper->connections);
    if (usp_reception_create(&keeper->host, &keeper->reception) != USP_OK) exit(1);
    if (usp_tcp_listen(&usp_loopback, 0, &keeper->listener, &keeper->port) != USP_OK) exit(1);
    if (pthread_create(&keeper->thread, NULL, usp_keep, keeper) != 0) exit(1);
    return keeper;
}

/* Waits until it no longer does, and judges how that went. */
static int usp_keeper_end(usp_keeper *keeper, usp_status wanted, const char *words) {
    pthread_join(keeper->thread, NULL);
    int wrong = usp_check(NULL, keeper->status == wanted && (wanted == USP_OK || strstr(keeper->sentence, words)),
                          "the listener ends with %d, '%s', not with %d, '%s'", (int)keeper->status, keeper->sentence,
                          (int)wanted, words);
    usp_tcp_close(keeper->connections, USP_MOST);
    close(keeper->listener);
    free(keeper);
    return wrong;
}

static usp_status usp_join(const usp_keeper *keeper, int rank, int *connection) {
    usp_door door = {usp_job, rank, keeper->door.size};
    int64_t deadline = usp_tcp_deadline(USP_SOON_MS);
    return usp_door_connect(&door, &usp_loopback, keeper->port, 0, deadline, deadline, connection);
}

/* ---- a caller that speaks byte by byte as it likes --------------------------------------------------------------- */

/* The protocol once more, from its description. */
typedef struct usp_words {
    char magic[8];
    int32_t from, to, size, port;
    unsigned char nonce[16];
} usp_words;

typedef struct usp_spoken {
    usp_words words;
    uint64_t proof;
} usp_spoken;

static usp_words usp_words_of(int from, int to, int size, int port) {
    usp_words words = {.from = from, .to = to, .size = size, .port = port};
    memcpy(words.magic, "usp tcp2", sizeof words.magic);
    for (int i = 0; i < 16; i++) words.nonce[i] = (unsigned char)rand();
    return words;
}

static uint64_t usp_proof(const usp_key *key, char role, const usp_words *caller, const usp_words *listener) {
    char text[8 + 2 * sizeof *caller] = {role};
    memcpy(text + 8, caller, sizeof *caller);
    memcpy(text + 8 + sizeof *caller, listener, sizeof *listener);
    return usp_hash_keyed(key, text, sizeof text);
}

static int usp_dial(int port) {
    int connection = -1;
    if (usp_tcp_dial(&usp_loopback, port, usp_tcp_deadline(USP_SOON_MS), &connection) != 0) exit(1);
    return connection;
}

static int usp_hear(int connection, void *data, size_t bytes) {
    return usp_tcp_recv(connection, data, bytes, usp_tcp_deadline(USP_SOON_MS)) == USP_OK;
}

static void usp_say(int connection, const void *data, size_t bytes) {
    usp_tcp_send(connection, data, bytes, usp_tcp_deadline(USP_SOON_MS));
}

/* Greets as rank `from` and proves it by `key`. The verdict, or -1: turned away. What was said stays in *spoken. */
static int usp_try(int connection, const usp_key *key, const usp_words *words, usp_spoken *spoken) {
    usp_spoken answer;
    int32_t verdict;
    usp_say(connection, words, sizeof *words);
    if (!usp_hear(connection, &answer, sizeof answer)) return -1;
    *spoken = (usp_spoken){*words, usp_proof(key, 'c', words, &answer.words)};
    usp_say(connection, &spoken->proof, sizeof spoken->proof);
    return usp_hear(connection, &verdict, sizeof verdict) ? verdict : -1;
}

/* ---- who is let in ----------------------------------------------------------------------------------------------- */

/* Many ranks call at once, all slow to say who they are. */
static int usp_check_crowd(void) {
    usp_keeper *keeper = usp_keeper_start(USP_MOST, 20000);
    int connection[USP_MOST], refused = 0;
    for (int i = 1; i < USP_MOST; i++) connection[i] = usp_dial(keeper->port);
    usp_rest(100);
    for (int i = 1; i < USP_MOST; i++) {
        usp_spoken spoken;
        usp_words words = usp_words_of(i, 0, USP_MOST, keeper->port);
        refused += usp_try(connection[i], &usp_job, &words, &spoken) != USP_OK;
    }
    int wrong = usp_check(NULL, refused == 0, "%d of a crowd were refused", refused);
    wrong += usp_keeper_end(keeper, USP_OK, "");
    usp_tcp_close(connection + 1, USP_MOST - 1);
    return wrong;
}

/* A stranger asks in every way and is turned away; all that it hears is of no use. */
static int usp_check_stranger(void) {
    usp_keeper *keeper = usp_keeper_start(2, 600);
    usp_spoken spoken, answer;
    usp_words words = usp_words_of(1, 0, 2, keeper->port), elsewhere = usp_words_of(1, 1, 2, keeper->port);
    int one = usp_dial(keeper->port), two = usp_dial(keeper->port), three = usp_dial(keeper->port);
    int wrong = usp_check(NULL, usp_try(one, &usp_other_job, &words, &spoken) == -1, "another key was good enough");
    usp_say(two, &words, sizeof words); /* and gives the listener's own proof back */
    wrong += usp_check(NULL, usp_hear(two, &answer, sizeof answer), "no answer");
    wrong += usp_check(NULL, answer.proof == usp_proof(&usp_job, 'l', &words, &answer.words), "a wrong proof");
    usp_say(two, &answer.proof, sizeof answer.proof);
    wrong += usp_check(NULL, !usp_hear(two, &answer, 1), "its own proof was good enough");
    usp_say(three, &elsewhere, sizeof elsewhere);
    wrong += usp_check(NULL, !usp_hear(three, &answer, 1), "who wants another rank was answered");
    close(one), close(two), close(three);
    return wrong + usp_keeper_end(keeper, USP_TIMEOUT, "1 did not connect in time: rank 1");
}

/* What was recorded of a rank's call opens nothing; a rank that gave up may come again. */
static int usp_check_replay(void) {
    usp_keeper *keeper = usp_keeper_start(3, 10000);
    usp_spoken spoken, answer;
    usp_words words = usp_words_of(1, 0, 3, keeper->port);
    int first = usp_dial(keeper->port), second = -1, again = -1, other = -1;
    int wrong = usp_check(NULL, usp_try(first, &usp_job, &words, &spoken) == USP_OK, "a rank is not let in");
    close(first);
    second = usp_dial(keeper->port);
    usp_say(second, &spoken.words, sizeof spoken.words);
    wrong += usp_check(NULL, usp_hear(second, &answer, sizeof answer), "no answer");
    usp_say(second, &spoken.proof, sizeof spoken.proof);
    wrong += usp_check(NULL, !usp_hear(second, &answer, 1), "what was recorded was good enough");
    wrong += usp_check(NULL, usp_join(keeper, 1, &again) == USP_OK, "a rank that comes again: %s", usp_last_error());
    wrong += usp_check(NULL, usp_join(keeper, 2, &other) == USP_OK, "the last rank: %s", usp_last_error());
    close(second), close(again), close(other);
    return wrong + usp_keeper_end(keeper, USP_OK, "");
}

/* A rank that lives keeps its place; that somebody else proves to be it means that two jobs are one, and both hear it.
 */
static int usp_check_displacer(void) {
    usp_keeper *keeper = usp_keeper_start(3, 10000);
    int first = -1, second = -1;
    char byte = 0;
    int wrong = usp_check(NULL, usp_join(keeper, 1, &first) == USP_OK, "%s", usp_last_error());
    wrong += usp_check_failure(NULL, usp_join(keeper, 1, &second), USP_INVALID, "rank 1 came twice");
    pthread_join(keeper->thread, NULL);
    usp_say(keeper->connections[1], "!", 1);
    wrong += usp_check(NULL, usp_hear(first, &byte, 1) && byte == '!', "the first connection has been displaced");
    wrong += usp_check(NULL, keeper->took < 2000, "found out after %d ms", (int)keeper->took);
    wrong += usp_check(NULL, keeper->status == USP_INVALID && strstr(keeper->sentence, "rank 1 came twice"), "'%s'",
                       keeper->sentence);
    close(first);
    usp_tcp_close(keeper->connections, USP_MOST);
    close(keeper->listener);
    free(keeper);
    return wrong;
}

static int usp_check_sizes(void) {
    usp_keeper *keeper = usp_keeper_start(2, 10000);
    usp_door door = {usp_job, 1, 3};
    int connection;
    int64_t begin = usp_now_ms(), deadline = usp_tcp_deadline(USP_SOON_MS);
    usp_status status = usp_door_connect(&door, &usp_loopback, keeper->port, 0, deadline, deadline, &connection);
    int wrong = usp_check_failure(NULL, status, USP_MISMATCH, "rank 1 says the job has 3 ranks, rank 0 says 2");
    wrong += usp_keeper_end(keeper, USP_MISMATCH, "rank 1 says the job has 3 ranks, rank 0 says 2");
    return wrong + usp_check(NULL, usp_now_ms() - begin < 2000, "took %d ms", (int)(usp_now_ms() - begin));
}

/* ---- in the place of rank 0 -------------------------------------------------------------------------------------- */

/* Somebody else listens where rank 0 should. It answers with words of its own, the caller's, or those of the real one.
 */
typedef enum usp_trick { USP_INVENT, USP_ECHO, USP_RELAY } usp_trick;

typedef struct usp_squatter {
    usp_trick trick;
    int listener, port, real;
    size_t heard; /* bytes after the greeting */
} usp_squatter;

static void *usp_squat(void *argument) {
    usp_squatter *squatter = argument;
    usp_spoken spoken = {0};
    int caller, real = -1;
    do caller = usp_tcp_take(squatter->listener), usp_rest(1);
    while (caller < 0);
    usp_hear(caller, &spoken.words, sizeof spoken.words);
    if (squatter->trick == USP_INVENT) spoken.words = usp_words_of(0, 1, 2, squatter->port);
    if (squatter->trick == USP_RELAY) {
        real = usp_dial(squatter->real);
        spoken.words.port = squatter->real;
        usp_say(real, &spoken.words, sizeof spoken.words);
        usp_hear(real, &spoken, sizeof spoken);
        spoken.words.port = squatter->port;
    }
    usp_say(caller, &spoken, sizeof spoken);
    while (recv(caller, &spoken, 1, 0) != 0 && squatter->heard < 100) {
        squatter->heard += errno != EAGAIN;
        errno = 0;
        usp_rest(1);
    }
    close(caller);
    if (real >= 0) close(real);
    return NULL;
}

static int usp_check_squatter(usp_trick trick) {
    usp_keeper *keeper = usp_keeper_start(2, 500);
    usp_squatter squatter = {.trick = trick, .real = keeper->port};
    usp_door door = {usp_job, 1, 2};
    pthread_t thread;
    int connection;
    int64_t deadline = usp_tcp_deadline(USP_SOON_MS);
    if (usp_tcp_listen(&usp_loopback, 0, &squatter.listener, &squatter.port) != USP_OK) exit(1);
    if (pthread_create(&thread, NULL, usp_squat, &squatter) != 0) exit(1);
    usp_status status = usp_door_connect(&door, &usp_loopback, squatter.port, 0, deadline, deadline, &connection);
    int wrong = usp_check_failure(NULL, status, USP_PEER_FAILED, "another program answers in place of rank 0");
    pthread_join(thread, NULL);
    close(squatter.listener);
    wrong += usp_check(NULL, squatter.heard == 0, "trick %d: the caller tried to prove itself", (int)trick);
    return wrong + usp_keeper_end(keeper, USP_TIMEOUT, "rank 1");
}

/* ---- what this host has ------------------------------------------------------------------------------------------ */

/* Runs in a child, whose descriptors it may spend and whose environment it may spoil. */
static int usp_in_child(int (*body)(void)) {
    int state;
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) exit(body());
    return child < 0 || waitpid(child, &state, 0) != child ||
           usp_check(NULL, WIFEXITED(state) && WEXITSTATUS(state) == 0, "a child ended with state %d", state);
}

/* No descriptor to take or to make a call with: both say so at once. */
static int usp_check_exhausted(void) {
    usp_world_config defaults = {.struct_size = sizeof defaults};
    usp_host host = usp_host_from_config(&defaults);
    usp_door door = {usp_job, 0, 2}, other = {usp_job, 1, 2};
    int listener, port, connections[2] = {-1, -1};
    usp_reception *reception;
    if (usp_reception_create(&host, &reception) != USP_OK) return 1;
    if (usp_tcp_listen(&usp_loopback, 0, &listener, &port) != USP_OK) return 1;
    int caller = usp_dial(port);
    setrlimit(RLIMIT_NOFILE, &(struct rlimit){100, 100});
    while (dup(0) >= 0) continue;
    int64_t begin = usp_now_ms(), deadline = usp_tcp_deadline(10000);
    usp_status status = usp_door_accept(&door, reception, listener, 1, deadline, connections);
    usp_reception_destroy(reception);
    int wrong = usp_check_failure(NULL, status, USP_COMM, "no connection can be taken: Too many open files");
    status = usp_door_connect(&other, &usp_loopback, port, 0, deadline, deadline, &connections[0]);
    wrong += usp_check_failure(NULL, status, USP_COMM, "no socket: Too many open files");
    close(caller);
    return wrong + usp_check(NULL, usp_now_ms() - begin < 1000, "found out late");
}

/* Ranks 1 to 3, who have called already, say who they are. */
typedef struct usp_three {
    int port, connections[3];
} usp_three;

static void *usp_introduce(void *argument) {
    const usp_three *three = argument;
    for (int i = 0; i < 3; i++) {
        usp_spoken spoken;
        usp_words words = usp_words_of(i + 1, 0, 4, three->port);
        usp_try(three->connections[i], &usp_job, &words, &spoken);
    }
    return NULL;
}

/* This host has room for so many ranks of the three that are missing. */
static int usp_check_room(int room, usp_status wanted) {
    usp_world_config defaults = {.struct_size = sizeof defaults};
    usp_host host = usp_host_from_config(&defaults);
    usp_door door = {usp_job, 0, 4};
    usp_three three;
    int listener, connections[4] = {-1, -1, -1, -1}, last = 0;
    usp_reception *reception;
    pthread_t thread;
    if (usp_reception_create(&host, &reception) != USP_OK) return 1;
    if (usp_tcp_listen(&usp_loopback, 0, &listener, &three.port) != USP_OK) return 1;
    for (int i = 0; i < 3; i++) three.connections[i] = usp_dial(three.port);
    setrlimit(RLIMIT_NOFILE, &(struct rlimit){100, 100});
    for (int next = 0; next >= 0; next = dup(0)) last = next;
    for (int i = 0; i < room; i++) close(last - i);
    if (pthread_create(&thread, NULL, usp_introduce, &three) != 0) return 1;
    int64_t begin = usp_now_ms();
    usp_status status = usp_door_accept(&door, reception, listener, 1, usp_tcp_deadline(3000), connections);
    int wrong = usp_check(NULL, status == wanted, "room for %d: %s", room, usp_last_error());
    wrong += usp_check(NULL, usp_now_ms() - begin < 1000, "room for %d: known late", room);
    usp_reception_destroy(reception);
    close(listener);
    pthread_join(thread, NULL);
    return wrong;
}

static int usp_check_enough(void) {
    return usp_check_room(3, USP_OK);
}

static int usp_check_scarce(void) {
    return usp_check_room(2, USP_COMM);
}

static int usp_check_choice(const char *list, int loopback) {
    usp_ip ip = {{0}};
    int count = 0;
    setenv("USP_INTERFACE", list, 1);
    usp_status status = usp_tcp_own_ips(&ip, 1, &count);
    if (loopback) return usp_check(NULL, status == USP_OK && usp_tcp_is_loopback(&ip), "'%s' does not choose lo", list);
    return usp_check(NULL, status != USP_OK || !usp_tcp_is_loopback(&ip), "'%s' chooses lo", list);
}

static int usp_check_interface(void) {
    usp_ip ips[8], near;
    int count, listener, port, wrong = 0;
    unsetenv("USP_INTERFACE");
    wrong += usp_check(NULL, usp_tcp_own_ips(ips, 8, &count) == USP_OK, "%s", usp_last_error());
    for (int i = 0; i < count; i++) wrong += usp_check(NULL, !usp_tcp_is_loopback(&ips[i]), "lo unasked for");
    wrong += usp_check_choice("lo", 1) + usp_check_choice("=lo", 1) + usp_check_choice("nothing,lo", 1);
    wrong += usp_check_choice("l", 1) + usp_check_choice("=l", 0) + usp_check_choice("^lo", 0);
    wrong += usp_check_choice("^l", 0) + usp_check_choice("lonely", 0);
    setenv("USP_INTERFACE", "none77", 1);
    wrong += usp_check_failure(NULL, usp_tcp_own_ips(ips, 8, &count), USP_INVALID, "'none77': no such interface");
    wrong += usp_check_failure(NULL, usp_tcp_listen(NULL, 0, &listener, &port), USP_INVALID, "USP_INTERFACE");
    setenv("USP_INTERFACE", "lo", 1);
    if (usp_check(NULL, usp_tcp_listen(NULL, 0, &listener, &port) == USP_OK, "%s", usp_last_error())) return 1;
    usp_tcp_near(listener, &near, &port);
    return wrong + usp_check(NULL, usp_tcp_is_loopback(&near), "listens elsewhere too");
}

int main(void) {
    alarm(USP_SECONDS);
    int wrong = usp_check_hash() + usp_check_text() + usp_check_crowd() + usp_check_stranger() + usp_check_replay();
    wrong += usp_check_displacer() + usp_check_sizes();
    wrong += usp_check_squatter(USP_INVENT) + usp_check_squatter(USP_ECHO) + usp_check_squatter(USP_RELAY);
    wrong += usp_in_child(usp_check_exhausted) + usp_in_child(usp_check_interface);
    wrong += usp_in_child(usp_check_enough) + usp_in_child(usp_check_scarce);
    printf("%s: %d wrong\n", wrong ? "FAIL" : "ok", wrong);
    return wrong != 0;
}
