/* usp_launch.c - starts N copies of a program on this host, each with its rank in the environment, and waits for them.
 * It passes no data and opens no connection; what the ranks do with each other is theirs. */
#include "tool.h"
#include <argp.h>
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { USP_MOST_RANKS = 1024, USP_KEY_KILL = 256, USP_KEY_PORT, USP_STATUS_TIMEOUT = 124, USP_GRACE_SECONDS = 5 };

typedef struct usp_job {
    int size, port, seconds, kill; /* options; 0: none */
    char **program;
    pid_t child[USP_MOST_RANKS]; /* 0: has ended */
    int running, status;
    int64_t end; /* when to kill what still runs; -1: never */
} usp_job;

/* ---- options ----------------------------------------------------------------------------------------------------- */

static int usp_number(struct argp_state *state, const char *name, const char *text, int low, int high) {
    char *end;
    errno = 0;
    long number = strtol(text, &end, 10);
    if (errno || end == text || *end || number < low || number > high)
        argp_error(state, "%s is '%s', not a number from %d to %d", name, text, low, high);
    return (int)number;
}

static error_t usp_option(int key, char *text, struct argp_state *state) {
    usp_job *job = state->input;
    switch (key) {
    case 'n':
        job->size = usp_number(state, "-n", text, 1, USP_MOST_RANKS);
        return 0;
    case 't':
        job->seconds = usp_number(state, "-t", text, 1, 1000000);
        return 0;
    case USP_KEY_PORT:
        job->port = usp_number(state, "--port", text, 1, 65535);
        return 0;
    case USP_KEY_KILL:
        job->kill = 1;
        return 0;
    case 'h':
        argp_state_help(state, stdout, ARGP_HELP_STD_HELP);
        return 0;
    case ARGP_KEY_ARG:
        job->program = &state->argv[state->next - 1];
        state->next = state->argc;
        return 0;
    case ARGP_KEY_END:
        if (!job->program) argp_error(state, "which program?");
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static void usp_read_options(int argc, char **argv, usp_job *job) {
    static const struct argp_option options[] = {
        {"ranks", 'n', "N", 0, "Start N processes (default 1)", 0},
        {"time", 't', "SECONDS", 0, "Kill what still runs after so many seconds; the status is then 124", 0},
        {"port", USP_KEY_PORT, "PORT", 0, "MASTER_PORT, where rank 0 listens (default: a free one)", 0},
        {"kill", USP_KEY_KILL, NULL, 0, "When one rank fails, end the others (default: they go on)", 0},
        {NULL, 'h', NULL, 0, "The same as --help", -1},
        {0}};
    static const char text[] =
        "Starts N copies of PROGRAM on this host and waits for them. Each finds RANK, WORLD_SIZE, LOCAL_RANK, "
        "LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT in its environment, as usp_world_create_env reads them, and "
        "USP_JOB_TOKEN, a random number that keeps this job apart from others, unless it is set already."
        "\vThe status is that of the first rank that failed: its own, or 128 plus the signal that ended it. SIGINT and "
        "SIGTERM are passed on to the ranks; the second time they are killed.";
    const struct argp argp = {options, usp_option, "PROGRAM [ARGUMENT...]", text, NULL, NULL, NULL};
    argp_program_version_hook = usp_tool_print_version;
    argp_parse(&argp, argc, argv, ARGP_IN_ORDER, NULL, job);
}

/* ---- starting ---------------------------------------------------------------------------------------------------- */

/* A port that was free a moment ago; rank 0 tries the next ones if it no longer is. */
static int usp_free_port(void) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof address;
    int descriptor = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), port = 29400;
    if (descriptor < 0) return port;
    if (bind(descriptor, (struct sockaddr *)&address, sizeof address) == 0 &&
        getsockname(descriptor, (struct sockaddr *)&address, &length) == 0 && ntohs(address.sin_port) < 65000)
        port = ntohs(address.sin_port);
    close(descriptor);
    return port;
}

static void usp_set_number(const char *name, int value) {
    char text[16];
    snprintf(text, sizeof text, "%d", value);
    setenv(name, text, 1);
}

/* Another number for each job, which nobody guesses, unless the user has given the job a name. */
static void usp_set_token(void) {
    unsigned char random[16];
    char text[2 * sizeof random + 1] = "";
    if (getrandom(random, sizeof random, 0) != (ssize_t)sizeof random) return;
    for (size_t i = 0; i < sizeof random; i++) snprintf(text + 2 * i, 3, "%02x", random[i]);
    setenv("USP_JOB_TOKEN", text, 0);
}

/* Becomes rank `rank`; no rank outlives the launcher. */
static void usp_become(const usp_job *job, int rank, pid_t launcher, const sigset_t *mask) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != launcher) _exit(127); /* it was gone before that */
    sigprocmask(SIG_SETMASK, mask, NULL);
    usp_set_number("RANK", rank);
    usp_set_number("LOCAL_RANK", rank);
    usp_set_number("WORLD_SIZE", job->size);
    usp_set_number("LOCAL_WORLD_SIZE", job->size);
    usp_set_number("MASTER_PORT", job->port);
    setenv("MASTER_ADDR", "127.0.0.1", 1);
    execvp(job->program[0], job->program);
    fprintf(stderr, "usp_launch: cannot start %s: %s\n", job->program[0], strerror(errno));
    _exit(127);
}

static void usp_kill_all(const usp_job *job, int signal) {
    for (int rank = 0; rank < job->size; rank++)
        if (job->child[rank] > 0) kill(job->child[rank], signal);
}

static int usp_start(usp_job *job, const sigset_t *mask) {
    const pid_t launcher = getpid();
    for (int rank = 0; rank < job->size; rank++) {
        pid_t child = fork();
        if (child == 0) usp_become(job, rank, launcher, mask);
        if (child < 0) {
            fprintf(stderr, "usp_launch: cannot start rank %d: %s\n", rank, strerror(errno));
            usp_kill_all(job, SIGKILL);
            return 1;
        }
        job->child[rank] = child;
        job->running++;
    }
    return 0;
}

/* ---- waiting ----------------------------------------------------------------------------------------------------- */

static int64_t usp_now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000 + time.tv_nsec / 1000000;
}

/* The others get some time to end by themselves. */
static void usp_end_all(usp_job *job, int signal) {
    int64_t soon = usp_now() + 1000 * USP_GRACE_SECONDS;
    usp_kill_all(job, signal);
    if (job->end < 0 || soon < job->end) job->end = soon;
}

static void usp_note(usp_job *job, int rank, int state) {
    int signal = WIFSIGNALED(state) ? WTERMSIG(state) : 0, status = signal ? 128 + signal : WEXITSTATUS(state);
    job->child[rank] = 0;
    job->running--;
    if (status == 0) return;
    if (signal)
        fprintf(stderr, "usp_launch: rank %d was ended by signal %d (%s)\n", rank, signal, strsignal(signal));
    else
        fprintf(stderr, "usp_launch: rank %d ended with status %d\n", rank, status);
    if (job->status == 0) {
        job->status = status;
        if (job->kill) usp_end_all(job, SIGTERM);
    }
}

static void usp_reap(usp_job *job) {
    for (int rank = 0, state; rank < job->size; rank++)
        if (job->child[rank] > 0 && waitpid(job->child[rank], &state, WNOHANG) > 0) usp_note(job, rank, state);
}

/* A terminal has already given its signal to the ranks too. */
static void usp_pass_on(usp_job *job, const siginfo_t *info, int *before) {
    if (*before)
        usp_kill_all(job, SIGKILL);
    else if (info->si_code != SI_KERNEL)
        usp_kill_all(job, info->si_signo);
    *before = 1;
}

static void usp_time_out(usp_job *job) {
    for (int rank = 0; rank < job->size; rank++)
        if (job->child[rank] > 0) fprintf(stderr, "usp_launch: rank %d had to be killed: out of time\n", rank);
    if (job->status == 0) job->status = USP_STATUS_TIMEOUT;
    usp_kill_all(job, SIGKILL);
    job->end = -1;
}

static void usp_wait(usp_job *job, const sigset_t *signals) {
    int interrupted = 0;
    while (job->running > 0) {
        siginfo_t info;
        int64_t left = job->end < 0 ? 1000 : job->end - usp_now();
        struct timespec time = {left / 1000, left % 1000 * 1000000};
        if (left <= 0)
            usp_time_out(job);
        else if (sigtimedwait(signals, &info, &time) > 0 && info.si_signo != SIGCHLD)
            usp_pass_on(job, &info, &interrupted);
        usp_reap(job);
    }
}

int main(int argc, char **argv) {
    usp_job job = {.size = 1, .end = -1};
    sigset_t signals, before;
    usp_tool_guard_output(1);
    usp_read_options(argc, argv, &job);
    if (job.port == 0) job.port = usp_free_port();
    sigemptyset(&signals);
    sigaddset(&signals, SIGCHLD);
    sigaddset(&signals, SIGINT);
    sigaddset(&signals, SIGTERM);
    sigprocmask(SIG_BLOCK, &signals, &before);
    if (job.seconds > 0) job.end = usp_now() + 1000 * (int64_t)job.seconds;
    usp_set_token();
    if (usp_start(&job, &before)) return 1;
    usp_wait(&job, &signals);
    return job.status;
}
