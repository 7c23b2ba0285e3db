/* check_launcher.c - what is understood of the variables that launchers set, well and badly. A plain program: each case
 * is a list of variables, read in a child that has no others. */
#define _GNU_SOURCE
#include "conformance.h"
#include "launcher.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

enum { USP_SECONDS = 60 };

/* What the variables ("A=1 B=2", values without blanks) come to. */
typedef struct usp_reading {
    const char *variables, *launcher;
    int rank, size, local_rank;
    const char *address;
    int port; /* 0: any that is made of the name */
} usp_reading;

#define USP_TORCH "WORLD_SIZE=4 RANK=1 LOCAL_RANK=1 MASTER_PORT=29500 "
#define USP_STEP "SLURM_JOB_ID=9 SLURM_STEP_ID=0 SLURM_LOCALID=0 "

static const usp_reading usp_readings[] = {
    {"", "none", 0, 1, 0, "", 0},
    {"PMIX_RANK=0 PMIX_NAMESPACE=5", "none", 0, 1, 0, "", 0}, /* what MPI sets in a process alone */
    /* torchrun and what is written by hand */
    {USP_TORCH "MASTER_ADDR=localhost", "torchrun", 1, 4, 1, "localhost", 29500},
    {USP_TORCH "MASTER_ADDR=[::1]", "torchrun", 1, 4, 1, "::1", 29500},
    {USP_TORCH "MASTER_ADDR=[fd00::2]", "torchrun", 1, 4, 1, "fd00::2", 29500},
    {"WORLD_SIZE=4 RANK=3 MASTER_ADDR=a MASTER_PORT=65535", "torchrun", 3, 4, 3, "a", 65535},
    {USP_STEP "SLURM_PROCID=2 SLURM_STEP_NUM_TASKS=3 SLURM_STEP_NUM_NODES=2 MASTER_ADDR=a MASTER_PORT=7", "SLURM", 2, 3,
     0, "a", 7},
    {USP_STEP "SLURM_PROCID=2 SLURM_STEP_NUM_TASKS=3 SLURM_STEP_NUM_NODES=1", "SLURM", 2, 3, 0, "127.0.0.1", 0},
    /* srun --mpi=pmi2 sets PMI's as well */
    {USP_STEP "SLURM_PROCID=2 SLURM_STEP_NUM_TASKS=3 SLURM_STEP_NUM_NODES=1 PMI_RANK=2 PMI_SIZE=3", "SLURM", 2, 3, 0,
     "127.0.0.1", 0},
    /* MPICH's and Intel's mpiexec; PMI_ID names nothing */
    {"PMI_RANK=1 PMI_SIZE=2 MPI_LOCALRANKID=1 MPI_LOCALNRANKS=2", "PMI", 1, 2, 1, "127.0.0.1", 0},
    {"PMI_RANK=1 PMI_SIZE=2 PMI_ID=1 MPI_LOCALRANKID=1 MPI_LOCALNRANKS=2", "PMI", 1, 2, 1, "127.0.0.1", 0},
    /* the same in an allocation: from a shell that is a step, and with proxies that are one */
    {USP_STEP "SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=1 SLURM_STEP_NUM_NODES=1 PMI_RANK=3 PMI_SIZE=4 MPI_LOCALRANKID=3 "
              "MPI_LOCALNRANKS=4",
     "PMI", 3, 4, 3, "127.0.0.1", 0},
    {USP_STEP "SLURM_PROCID=1 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NUM_NODES=2 PMI_RANK=3 PMI_SIZE=4 MPI_LOCALRANKID=1 "
              "MPI_LOCALNRANKS=2 MASTER_ADDR=a MASTER_PORT=7",
     "PMI", 3, 4, 1, "a", 7},
    /* Open MPI, alone and in an allocation */
    {"OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_LOCAL_SIZE=2 PMIX_NAMESPACE=5 PMIX_RANK=1",
     "Open MPI", 1, 2, 1, "127.0.0.1", 0},
    {USP_STEP "SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=1 SLURM_STEP_NUM_NODES=1 OMPI_COMM_WORLD_RANK=1 "
              "OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_LOCAL_SIZE=2 PMIX_NAMESPACE=5",
     "Open MPI", 1, 2, 1, "127.0.0.1", 0},
    /* torchrun that something else has started, once or on every node */
    {USP_STEP "SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=1 SLURM_STEP_NUM_NODES=1 MASTER_ADDR=a " USP_TORCH, "torchrun", 1, 4,
     1, "a", 29500},
    {"OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=1 MASTER_ADDR=a " USP_TORCH, "torchrun", 1, 4, 1, "a", 29500},
    {USP_STEP "SLURM_PROCID=3 SLURM_STEP_NUM_TASKS=4 TORCHELASTIC_RUN_ID=x WORLD_SIZE=1 RANK=0", "torchrun", 0, 1, 0,
     "", 0},
};

/* What is refused, with these words in the sentence. */
typedef struct usp_refusal {
    const char *variables, *words;
} usp_refusal;

static const usp_refusal usp_refusals[] = {
    {USP_TORCH, "MASTER_ADDR is not set"},
    {"WORLD_SIZE=4 RANK=3 MASTER_ADDR=a MASTER_PORT=70000", "MASTER_PORT is '70000'"},
    {"WORLD_SIZE=4 RANK=3 MASTER_ADDR=a", "MASTER_PORT is not set"},
    {"WORLD_SIZE=4 MASTER_ADDR=a MASTER_PORT=1", "RANK is not set"},
    {"WORLD_SIZE=4 RANK= MASTER_ADDR=a", "variable RANK"},
    {"WORLD_SIZE=4 RANK=-1 MASTER_ADDR=a", "variable RANK"},
    {"WORLD_SIZE=4 RANK=4 MASTER_ADDR=a", "variable RANK"},
    {"WORLD_SIZE=4 RANK=0x1 MASTER_ADDR=a", "variable RANK"},
    {"WORLD_SIZE=4 RANK=+1 MASTER_ADDR=a", "variable RANK"},
    {"WORLD_SIZE=4 RANK=1e0 MASTER_ADDR=a", "variable RANK"},
    {"WORLD_SIZE=4 RANK=1x MASTER_ADDR=a", "variable RANK"},
    {"WORLD_SIZE=4 RANK=99999999999999999999 MASTER_ADDR=a", "variable RANK"},
    {"WORLD_SIZE=0 RANK=0", "variable WORLD_SIZE"},
    /* SLURM: on several hosts, on one, and two steps of a job */
    {USP_STEP "SLURM_PROCID=2 SLURM_STEP_NUM_TASKS=3 SLURM_STEP_NUM_NODES=2", "MASTER_ADDR is not set"},
    {"PMI_RANK=1 PMI_SIZE=4 MPI_LOCALRANKID=1 MPI_LOCALNRANKS=2", "MASTER_ADDR is not set"},
    /* one launcher says 1 and another more */
    {"OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=1 PMI_RANK=2 PMI_SIZE=4 MPI_LOCALNRANKS=4",
     "OMPI_COMM_WORLD_SIZE is 1 (Open MPI), PMI_SIZE is 4 (PMI)"},
    {"OMPI_COMM_WORLD_RANK=3 OMPI_COMM_WORLD_SIZE=4 PMI_RANK=0 PMI_SIZE=1 MPI_LOCALNRANKS=1",
     "OMPI_COMM_WORLD_SIZE is 4 (Open MPI), PMI_SIZE is 1 (PMI)"},
    {"WORLD_SIZE=1 RANK=0 OMPI_COMM_WORLD_RANK=3 OMPI_COMM_WORLD_SIZE=4",
     "WORLD_SIZE is 1 (torchrun), OMPI_COMM_WORLD_SIZE is 4"},
    {USP_STEP "SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=4 PMI_RANK=0 PMI_SIZE=1 MPI_LOCALNRANKS=1",
     "PMI_SIZE is 1 (PMI), SLURM_STEP_NUM_TASKS is 4 (SLURM)"},
    {"PMIX_RANK=1 PMIX_NAMESPACE=job", "PMIX_RANK is 1, but no variable says how many"},
};

/* ---- reading ----------------------------------------------------------------------------------------------------- */

static void usp_set_variables(const char *variables) {
    char copy[512], *next = copy;
    snprintf(copy, sizeof copy, "%s", variables);
    for (char *one = strsep(&next, " "); one; one = strsep(&next, " "))
        if (*one) putenv(strdup(one));
}

/* In a child with these variables alone. */
static int usp_with(const char *variables, int (*body)(const void *), const void *argument) {
    int state = 1;
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        clearenv();
        usp_set_variables(variables);
        exit(body(argument));
    }
    return child < 0 || waitpid(child, &state, 0) != child || state != 0;
}

static int usp_check_reading(const void *argument) {
    const usp_reading *wanted = argument;
    usp_placement placement;
    usp_status status = usp_launcher_read(&placement);
    if (usp_check(NULL, status == USP_OK, "'%s': %s", wanted->variables, usp_last_error())) return 1;
    int right = strcmp(placement.launcher, wanted->launcher) == 0 && placement.rank == wanted->rank &&
                placement.size == wanted->size && placement.local_rank == wanted->local_rank &&
                strcmp(placement.address, wanted->address) == 0 &&
                (wanted->port || wanted->size == 1 ? placement.port == wanted->port : placement.port >= 20000);
    return usp_check(NULL, right, "'%s': %s, rank %d of %d, local %d, at '%s':%d", wanted->variables,
                     placement.launcher, placement.rank, placement.size, placement.local_rank, placement.address,
                     placement.port);
}

static int usp_check_refusal(const void *argument) {
    const usp_refusal *refusal = argument;
    usp_placement placement;
    return usp_check_failure(NULL, usp_launcher_read(&placement), USP_INVALID, refusal->words);
}

/* ---- names ------------------------------------------------------------------------------------------------------- */

/* The name of the job that these variables make: in a child that began with them, or in the child of a shell that did,
 * which itself was started by a process split off from this one. */
static void usp_name(const char *variables, int wrapped, char name[256]) {
    char self[64], command[96];
    int ends[2], state;
    snprintf(self, sizeof self, "/proc/%d/exe", getpid());
    snprintf(command, sizeof command, "%s name; true", self);
    if (pipe(ends) != 0) exit(1);
    pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], 1);
        if (wrapped && fork() > 0) _exit(wait(&state) < 0 || state != 0);
        clearenv();
        usp_set_variables(variables);
        if (wrapped) execl("/bin/sh", "sh", "-c", command, NULL);
        execl(self, self, "name", NULL);
        _exit(1);
    }
    close(ends[1]);
    ssize_t got = read(ends[0], name, 255);
    name[got > 0 ? got : 0] = 0;
    close(ends[0]);
    if (child < 0 || waitpid(child, &state, 0) != child || state != 0) usp_check(NULL, 0, "no name");
}

static int usp_check_name(const char *variables, const char *wanted) {
    char name[256];
    usp_name(variables, 0, name);
    return usp_check(NULL, strcmp(name, wanted) == 0, "'%s' is called '%s'", variables, name);
}

/* Both ranks of a job, one of them behind a shell, have the name of the process that started them: of this one. */
static int usp_check_starter(const char *one, const char *two, int has_starter) {
    char first[256], second[256], own[32];
    usp_name(one, 0, first);
    usp_name(two, 1, second);
    snprintf(own, sizeof own, "@%d.", getpid());
    int wrong = usp_check(NULL, strcmp(first, second) == 0, "'%s' and '%s' in one job", first, second);
    return wrong + usp_check(NULL, !has_starter == !strstr(first, own), "'%s' is called '%s'", one, first);
}

static int usp_check_names(void) {
    int wrong = usp_check_name("SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NUM_NODES=1 SLURM_JOB_ID=7 "
                               "SLURM_STEP_ID=1",
                               "7.1");
    wrong += usp_check_name("WORLD_SIZE=2 RANK=0 MASTER_ADDR=a MASTER_PORT=7", "");
    wrong += usp_check_name("WORLD_SIZE=2 RANK=0 MASTER_ADDR=a MASTER_PORT=7 USP_JOB_TOKEN=mine", "mine");
    wrong += usp_check_name("PMI_RANK=0 PMI_SIZE=2 MPI_LOCALNRANKS=2 PMI_ID=0 USP_JOB_TOKEN=mine", "mine");
    wrong += usp_check_starter("PMI_RANK=0 PMI_SIZE=2 MPI_LOCALNRANKS=2", "PMI_RANK=1 PMI_SIZE=2 MPI_LOCALNRANKS=2", 1);
    wrong += usp_check_starter(
        "WORLD_SIZE=2 LOCAL_WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=7 TORCHELASTIC_RUN_ID=none RANK=0",
        "WORLD_SIZE=2 LOCAL_WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=7 TORCHELASTIC_RUN_ID=none RANK=1", 1);
    /* by hand, perhaps in two terminals */
    wrong += usp_check_starter("WORLD_SIZE=2 LOCAL_WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=7 RANK=0",
                               "WORLD_SIZE=2 LOCAL_WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=7 RANK=1", 0);
    return wrong;
}

static int usp_say_name(void) {
    usp_placement placement;
    if (usp_launcher_read(&placement) != USP_OK) return 1;
    fputs(placement.job, stdout);
    return 0;
}

int main(int argc, char **argv) {
    int wrong = 0;
    (void)argv;
    if (argc > 1) return usp_say_name();
    alarm(USP_SECONDS);
    for (size_t i = 0; i < sizeof usp_readings / sizeof *usp_readings; i++)
        wrong += usp_with(usp_readings[i].variables, usp_check_reading, &usp_readings[i]);
    for (size_t i = 0; i < sizeof usp_refusals / sizeof *usp_refusals; i++)
        wrong += usp_with(usp_refusals[i].variables, usp_check_refusal, &usp_refusals[i]);
    wrong += usp_check_names();
    printf("%s: %d wrong\n", wrong ? "FAIL" : "ok", wrong);
    return wrong != 0;
}
