/* output.h - a file that a tool writes: it appears whole, or what was there stays as it was.
 * Nothing is ever removed, and what is no regular file is written as it is. */
#ifndef USP_OUTPUT_H
#define USP_OUTPUT_H
#include "tool.h"

typedef struct usp_output {
    FILE *stream;     /* NULL: not open */
    const char *path; /* as the user gave it, for sentences */
    char *target;     /* what links lead to */
    char *temporary;  /* the file beside it that is written; NULL: the target itself is, a device or a pipe */
} usp_output;

/* Opens the file for writing; fails where it could not take its place later. `path` must outlive the output. */
usp_status usp_output_open(usp_output *output, const char *path, usp_tool_error *error);
/* Puts the file in its place if `status` is OK and every byte could be written, else forgets it. Returns `status`, or
 * why it could not be written. Fine with an output that is not open. */
usp_status usp_output_close(usp_output *output, usp_status status, usp_tool_error *error);

/* 1 if both paths name one regular file, there or yet to be made, however they are spelled. */
int usp_output_same(const char *a, const char *b);

#endif
