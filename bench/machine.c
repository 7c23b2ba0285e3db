/* machine.c - reads /proc, and asks the libraries that the process has loaded for their versions.
 * Nothing here fails: a missing fact stays empty. */
#include "machine.h"
#include <dlfcn.h>
#include <glob.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include <usp.h>

#if defined(__clang__)
#define COMPILER "" /* clang's version says its name */
#else
#define COMPILER "gcc "
#endif

/* The text after "key<blanks>:<blanks>" of the first line that begins with key. */
static void read_field(const char *path, const char *key, char *value, size_t capacity) {
    char line[512];
    FILE *file = fopen(path, "r");
    while (file && fgets(line, sizeof line, file)) {
        char *colon = strchr(line, ':');
        if (strncmp(line, key, strlen(key)) || !colon) continue;
        colon += 1 + strspn(colon + 1, " \t");
        colon[strcspn(colon, "\n")] = 0;
        snprintf(value, capacity, "%s", colon);
        break;
    }
    if (file) fclose(file);
}

static void read_gpu(char *value, size_t capacity) {
    glob_t found = {0};
    if (glob("/proc/driver/nvidia/gpus/*/information", 0, NULL, &found) == 0)
        read_field(found.gl_pathv[0], "Model", value, capacity);
    globfree(&found);
}

/* Calls `status name(int *version)` of a library that is loaded anyway. */
static int loaded_version(const char *name) {
    int (*call)(int *), version = 0;
    void *symbol = dlsym(RTLD_DEFAULT, name);
    if (!symbol) return 0;
    memcpy(&call, &symbol, sizeof call);
    return call(&version) == 0 ? version : 0;
}

static void write_date(char *text, size_t capacity) {
    struct tm utc;
    time_t seconds = time(NULL);
    if (gmtime_r(&seconds, &utc)) strftime(text, capacity, "%Y-%m-%dT%H:%M:%SZ", &utc);
}

void usp_machine_describe(usp_machine *machine) {
    int version = usp_version();
    *machine = (usp_machine){.cores = (int)sysconf(_SC_NPROCESSORS_ONLN), .gpus = usp_device_count(USP_DEVICE_CUDA)};
    snprintf(machine->library, sizeof machine->library, "%d.%d.%d", version / 10000, version / 100 % 100,
             version % 100);
    snprintf(machine->compiler, sizeof machine->compiler, "%s%s", COMPILER, __VERSION__);
    gethostname(machine->host, sizeof machine->host - 1);
    read_field("/proc/cpuinfo", "model name", machine->processor, sizeof machine->processor);
    write_date(machine->date, sizeof machine->date);
    if (machine->gpus) {
        read_gpu(machine->gpu, sizeof machine->gpu);
        read_field("/proc/driver/nvidia/version", "NVRM version", machine->driver, sizeof machine->driver);
    }
    machine->cuda = loaded_version("cudaRuntimeGetVersion");
    machine->nccl = loaded_version("ncclGetVersion");
}
