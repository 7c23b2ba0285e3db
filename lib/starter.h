/* starter.h - the process that started the ranks of a job on this host, which tells it from other jobs. */
#ifndef USP_STARTER_H
#define USP_STARTER_H
#include <stddef.h>

/* Writes its name: of the nearest ancestor of this process that did not itself begin with the variable set, or whose
 * beginning may not be read. "" if there is none. */
void usp_starter_name(const char *variable, char *name, size_t room);

#endif
