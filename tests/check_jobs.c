/* check_jobs.c - two jobs at once on one host, started as launchers do, at ports that are neighbours or equal: no rank
 * ever meets one of the other job. A plain program. usage: check_jobs USP_LAUNCH JOB PAIRS [SEED] */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { USP_MOST = 8, USP_SECONDS_A_PAIR = 60, USP_FIRST_PORT = 21000, USP_PORT_STEP = 16, USP_PORT_BLOCKS = 600 };

typedef enum usp_way { USP_LAUNCH, USP_TORCHRUN, USP_TORCHRUN_OLD, USP_SLURM, USP_PMI, USP_WAYS } usp_way;

static const char *const usp_ways[USP_WAYS] = {"usp_launch", "torchrun", "torchrun without a store", "SLURM", "PMI"};

/* One job, and how it is started. */
typedef struct usp_job {
    usp_way way;
    int number, size, port; /* port 0: the launcher names none */
    unsigned seed;
} usp_job;

static void usp_set(const char *name, int value) {
    char text[16];
    snprintf(text, sizeof text, "%d", value);
    setenv(name, text, 1);
}

static void usp_rest(int milliseconds) {
    struct timespec time = {milliseconds / 1000, (long)(milliseconds % 1000) * 1000000L};
    nanosleep(&time, NULL);
}

/* ---- launchers: programs of their own, as real ones are ---------------------------------------------------------- */

static void usp_set_torchrun(const usp_job *job, int rank) {
    usp_set("RANK", rank), usp_set("LOCAL_RANK", rank), usp_set("GROUP_RANK", 0);
    usp_set("WORLD_SIZE", job->size), usp_set("LOCAL_WORLD_SIZE", job->size), usp_set("GROUP_WORLD_SIZE", 1);
    usp_set("MASTER_PORT", job->port);
    setenv("MASTER_ADDR", "localhost", 1);
    setenv("TORCHELASTIC_RUN_ID", "none", 1);
    setenv("TORCHELASTIC_USE_AGENT_STORE", job->way == USP_TORCHRUN ? "True" : "False", 1);
}

static void usp_set_slurm(const usp_job *job, int rank) {
    usp_set("SLURM_PROCID", rank), usp_set("SLURM_LOCALID", rank);
    usp_set("SLURM_STEP_NUM_TASKS", job->size), usp_set("SLURM_STEP_NUM_NODES", 1);
    usp_set("SLURM_JOB_ID", 77), usp_set("SLURM_STEP_ID", job->number); /* two steps of one allocation */
}

static void usp_set_pmi(const usp_job *job, int rank) {
    usp_set("PMI_RANK", rank), usp_set("PMI_SIZE", job->size), usp_set("PMI_ID", rank);
    usp_set("MPI_LOCALRANKID", rank), usp_set("MPI_LOCALNRANKS", job->size);
}

static void usp_become(const usp_job *job, int rank, const char *program) {
    char number[16], size[16];
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (job->way == USP_SLURM) usp_set_slurm(job, rank);
    if (job->way == USP_PMI) usp_set_pmi(job, rank);
    if (job->way == USP_TORCHRUN || job->way == USP_TORCHRUN_OLD) usp_set_torchrun(job, rank);
    if (job->port && job->way != USP_TORCHRUN) usp_set("MASTER_PORT", job->port), setenv("MASTER_ADDR", "127.0.0.1", 1);
    snprintf(number, sizeof number, "%d", job->number);
    snprintf(size, sizeof size, "%d", job->size);
    execl(program, program, number, size, NULL);
    _exit(127);
}

/* torchrun's agent listens at the announced port itself. */
static void usp_hold_port(int port) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_ANY)};
    int holder = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), one = 1;
    address.sin_port = htons((uint16_t)port);
    setsockopt(holder, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(holder, (struct sockaddr *)&address, sizeof address) == 0) listen(holder, 64); /* else another job does */
}

/* Starts the ranks in any order, some late, waits for them, and ends with the worst status. */
static int usp_agent(const usp_job *job, const char *program) {
    int worst = 0, state, first = rand() % job->size;
    if (job->way == USP_TORCHRUN) usp_hold_port(job->port);
    for (int i = 0; i < job->size; i++) {
        usp_rest(rand() % (rand() % 4 == 0 ? 100 : 10));
        if (fork() == 0) usp_become(job, (first + i) % job->size, program);
    }
    while (wait(&state) > 0) {
        int status = WIFEXITED(state) ? WEXITSTATUS(state) : 128;
        if (status > worst) worst = status;
    }
    return worst;
}

/* ---- pairs ------------------------------------------------------------------------------------------------------- */

static pid_t usp_start(const usp_job *job, const char *self, const char *launch, const char *program) {
    char text[5][16];
    const int values[5] = {(int)job->way, job->number, job->size, job->port, (int)job->seed};
    for (int i = 0; i < 5; i++) snprintf(text[i], sizeof text[i], "%d", values[i]);
    fflush(NULL);
    pid_t child = fork();
    if (child != 0) return child;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (job->way == USP_LAUNCH)
        execl(launch, launch, "-n", text[2], "--port", text[3], "-t", "50", program, text[1], text[2], NULL);
    else
        execl(self, self, "agent", program, text[0], text[1], text[2], text[3], text[4], NULL);
    _exit(127);
}

static int usp_end(const usp_job *job, pid_t child) {
    int state = 0;
    waitpid(child, &state, 0);
    int status = WIFEXITED(state) ? WEXITSTATUS(state) : 128;
    if (status != 0)
        fprintf(stderr, "job %d (%s, %d ranks, port %d): %s (status %d)\n", job->number, usp_ways[job->way], job->size,
                job->port, status == 3 ? "MIXED with the other" : "failed", status);
    return status != 0;
}

/* Each launcher beside each, in turn; the second job's port is the first one's or one that follows; half have one size.
 */
static int usp_pair(int pair, const char *self, const char *launch, const char *program) {
    int port = USP_FIRST_PORT + USP_PORT_STEP * (rand() % USP_PORT_BLOCKS), size = 2 + rand() % (USP_MOST - 1);
    usp_job jobs[2];
    pid_t child[2];
    for (int i = 0; i < 2; i++) {
        usp_way way = (usp_way)(i == 0 ? pair % USP_WAYS : (pair / USP_WAYS + pair) % USP_WAYS);
        jobs[i] = (usp_job){way, 2 * pair + i, size, port + i * (rand() % 3), (unsigned)rand()};
        if (rand() % 2) size = 2 + rand() % (USP_MOST - 1);
        if ((way == USP_SLURM || way == USP_PMI) && rand() % 2) jobs[i].port = 0;
    }
    if (jobs[0].port == jobs[1].port && jobs[0].way == USP_TORCHRUN && jobs[1].way == USP_TORCHRUN) jobs[1].port++;
    for (int i = 0; i < 2; i++) {
        child[i] = usp_start(&jobs[i], self, launch, program);
        usp_rest(rand() % 30);
    }
    return usp_end(&jobs[0], child[0]) + usp_end(&jobs[1], child[1]);
}

int main(int argc, char **argv) {
    if (argc == 8 && strcmp(argv[1], "agent") == 0) {
        usp_job job = {(usp_way)atoi(argv[3]), atoi(argv[4]), atoi(argv[5]), atoi(argv[6]), (unsigned)atoi(argv[7])};
        srand(job.seed);
        return usp_agent(&job, argv[2]);
    }
    if (argc < 4) return fprintf(stderr, "usage: check_jobs USP_LAUNCH JOB PAIRS [SEED]\n"), 2;
    int wrong = 0, pairs = atoi(argv[3]);
    unsigned seed = argc > 4 ? (unsigned)atoi(argv[4]) : (unsigned)time(NULL);
    unsetenv("USP_JOB_TOKEN");
    srand(seed);
    alarm((unsigned)(USP_SECONDS_A_PAIR * pairs));
    for (int pair = 0; pair < pairs; pair++) wrong += usp_pair(pair, "/proc/self/exe", argv[1], argv[2]);
    printf("%s: %d of %d jobs went wrong (seed %u)\n", wrong ? "FAIL" : "ok", wrong, 2 * pairs, seed);
    return wrong != 0;
}
