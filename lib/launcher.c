/* launcher.c - what the launcher of this process tells it through its environment. It asks no launcher and opens no
 * connection. */
#define _GNU_SOURCE
#include "launcher.h"
#include "error.h"
#include "hash.h"
#include "starter.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { USP_LAST_PORT = 65535, USP_MOST_RANKS = 1 << 16, USP_FIRST_PORT = 20000, USP_PORT_RANGE = 10000 };

/* The variables of one launcher; NULL: it has none of the kind. It is there if `size` is set. */
typedef struct usp_launcher {
    const char *name, *rank, *size, *local_rank;
    const char *job, *step;         /* name the job, and one of several groups of ranks that run in it */
    const char *local_size, *hosts; /* tell whether all ranks are on this host */
    const char *starts;             /* set where the launcher itself started the ranks, on this host */
} usp_launcher;

/* Those that start processes, then the one that makes allocations in which others start them. */
static const usp_launcher launchers[] = {
    {"torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID", NULL, "LOCAL_WORLD_SIZE", NULL,
     "TORCHELASTIC_RUN_ID"},
    {"Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "PMIX_NAMESPACE", NULL,
     "OMPI_COMM_WORLD_LOCAL_SIZE", NULL, "OMPI_COMM_WORLD_SIZE"},
    {"PMI", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", NULL, NULL, "MPI_LOCALNRANKS", NULL, "MPI_LOCALNRANKS"},
    {"SLURM", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_STEP_ID", NULL,
     "SLURM_STEP_NUM_NODES", NULL},
};

enum { USP_TORCHRUN, USP_OPEN_MPI, USP_PMI, USP_SLURM, USP_LAUNCHERS };

/* ---- variables --------------------------------------------------------------------------------------------------- */

/* The number that the whole text is, or -1. */
static int number_of(const char *text) {
    size_t digits = text ? strspn(text, "0123456789") : 0;
    return digits > 0 && digits < 10 && !text[digits] ? (int)strtol(text, NULL, 10) : -1;
}

static usp_status read_number(const char *name, int low, int high, int *value) {
    const char *text = secure_getenv(name);
    if (!text) return usp_fail(USP_INVALID, "the variable %s is not set", name);
    *value = number_of(text);
    if (*value >= low && *value <= high) return USP_OK;
    return usp_fail(USP_INVALID, "the variable %s is '%.40s', not a number from %d to %d", name, text, low, high);
}

static const char *read_text(const char *name) {
    const char *text = name ? secure_getenv(name) : NULL;
    return text && *text ? text : NULL;
}

/* ---- which launcher ---------------------------------------------------------------------------------------------- */

static int size_by(int launcher) {
    return number_of(secure_getenv(launchers[launcher].size));
}

/* PMI variables without a count of local ranks are those of srun --mpi=pmi2, which says more by its own. */
static int is_there(int launcher) {
    if (!secure_getenv(launchers[launcher].size)) return 0;
    return launcher != USP_PMI || read_text("MPI_LOCALNRANKS") || !secure_getenv(launchers[USP_SLURM].size);
}

/* One of the two sizes is 1 and the other is not. Fine where the one of 1 started the launcher of the others: a step of
 * SLURM that is a shell, or anything that started torchrun or usp_launch; and where torchrun was started many times. */
static int contradict(int chosen, int other) {
    int size = size_by(chosen), other_size = size_by(other);
    if (size == 1) return other_size > 1 && !read_text("TORCHELASTIC_RUN_ID");
    return size > 1 && other_size == 1 && chosen != USP_TORCHRUN && other != USP_SLURM;
}

static usp_status check_others(int chosen) {
    for (int i = chosen + 1; i < USP_LAUNCHERS; i++)
        if (is_there(i) && contradict(chosen, i))
            return usp_fail(USP_INVALID,
                            "launchers contradict each other: %s is %.20s (%s), %s is %.20s (%s); unset those that did "
                            "not start this process",
                            launchers[chosen].size, secure_getenv(launchers[chosen].size), launchers[chosen].name,
                            launchers[i].size, secure_getenv(launchers[i].size), launchers[i].name);
    return USP_OK;
}

/* A rank other than 0 that PMIx alone knows is one of several, and its environment does not say how many. (Rank 0 may
 * be alone: MPI says so of itself.) */
static usp_status check_alone(void) {
    USP_REQUIRE(number_of(secure_getenv("PMIX_RANK")) < 1,
                "PMIX_RANK is %.20s, but no variable says how many ranks there are: set RANK and WORLD_SIZE",
                secure_getenv("PMIX_RANK"));
    return USP_OK;
}

/* ---- what it says ------------------------------------------------------------------------------------------------ */

static usp_status read_ranks(const usp_launcher *launcher, usp_placement *placement) {
    placement->launcher = launcher->name;
    USP_TRY(read_number(launcher->size, 1, USP_MOST_RANKS, &placement->size));
    USP_TRY(read_number(launcher->rank, 0, placement->size - 1, &placement->rank));
    placement->local_rank = placement->rank;
    if (!secure_getenv(launcher->local_rank)) return USP_OK;
    return read_number(launcher->local_rank, 0, placement->size - 1, &placement->local_rank);
}

static usp_status read_here(const usp_launcher *launcher, usp_placement *placement) {
    int count = 0;
    placement->here = 0;
    if (read_text(launcher->local_size)) {
        USP_TRY(read_number(launcher->local_size, 1, USP_MOST_RANKS, &count));
        placement->here = count == placement->size;
    }
    if (read_text(launcher->hosts)) {
        USP_TRY(read_number(launcher->hosts, 1, USP_MOST_RANKS, &count));
        placement->here = count == 1;
    }
    return USP_OK;
}

/* The launcher's name for the job; where that need not be unique, or there is none, with the process that started the
 * ranks if all are its own; the caller's own name stands for both. */
static usp_status read_job(const usp_launcher *launcher, usp_placement *placement) {
    const char *own = read_text("USP_JOB_TOKEN"), *job = own ? own : read_text(launcher->job);
    const char *step = own ? NULL : read_text(launcher->step);
    char starter[64] = "";
    if (!own && placement->here && read_text(launcher->starts))
        usp_starter_name(launcher->rank, starter, sizeof starter);
    int length = snprintf(placement->job, sizeof placement->job, "%s%s%s%s%s", job ? job : "", step ? "." : "",
                          step ? step : "", *starter ? "@" : "", starter);
    USP_REQUIRE(length < (int)sizeof placement->job, "the variable %s is too long",
                own ? "USP_JOB_TOKEN" : launcher->job);
    return USP_OK;
}

/* Brackets, as in [::1], are a way to write an address and no part of it. */
static usp_status read_address(const usp_launcher *launcher, usp_placement *placement) {
    const char *address = read_text("MASTER_ADDR");
    USP_REQUIRE(address || (placement->here && placement->job[0]),
                "the variable MASTER_ADDR is not set (ranks from %s)", launcher->name);
    if (!address) address = "127.0.0.1";
    size_t length = strlen(address), in_brackets = length > 2 && *address == '[' && address[length - 1] == ']';
    length -= 2 * in_brackets;
    USP_REQUIRE(length < sizeof placement->address, "the variable MASTER_ADDR is too long");
    memcpy(placement->address, address + in_brackets, length);
    placement->address[length] = 0;
    return USP_OK;
}

/* Ranks of a job on one host that has a name need no port: the name gives it. */
static usp_status read_port(usp_placement *placement) {
    const char *store = read_text("TORCHELASTIC_USE_AGENT_STORE");
    placement->port_taken = store && strcmp(store, "True") == 0;
    if (read_text("MASTER_PORT") || !placement->here || !placement->job[0])
        return read_number("MASTER_PORT", 1, USP_LAST_PORT, &placement->port);
    placement->port = USP_FIRST_PORT + (int)(usp_hash(0, placement->job, strlen(placement->job)) % USP_PORT_RANGE);
    return USP_OK;
}

usp_status usp_launcher_read(usp_placement *placement) {
    int chosen = 0;
    *placement = (usp_placement){.launcher = "none", .size = 1};
    while (chosen < USP_LAUNCHERS && !is_there(chosen)) chosen++;
    if (chosen == USP_LAUNCHERS) return check_alone();
    const usp_launcher *launcher = &launchers[chosen];
    USP_TRY(read_ranks(launcher, placement));
    USP_TRY(check_others(chosen));
    USP_TRY(read_here(launcher, placement));
    USP_TRY(read_job(launcher, placement));
    if (placement->size == 1) return USP_OK;
    USP_TRY(read_address(launcher, placement));
    return read_port(placement);
}
