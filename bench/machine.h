/* machine.h - what ran where: host, processor, GPUs, versions.
 * Everything is found at run time without any CUDA or NCCL header; what cannot be found is empty. */
#ifndef USP_MACHINE_H
#define USP_MACHINE_H

typedef struct usp_machine {
    char host[128], processor[128], gpu[128], driver[128], date[32], compiler[128], library[16];
    int cores, gpus;
    int cuda, nccl; /* as their own version calls give it: 13000, 22809; 0: not linked */
} usp_machine;

void usp_machine_describe(usp_machine *machine);

#endif
