/* report.h - the rows of usp_bench as a table, as CSV and as JSON.
 * One list of columns serves the first two; only rank 0 reports. */
#ifndef USP_REPORT_H
#define USP_REPORT_H
#include "machine.h"
#include "measure.h"
#include "output.h"

enum { USP_JSON_SCHEMA = 2 };

typedef struct usp_report {
    const usp_options *options;
    const usp_rank *rank;
    usp_machine machine;
    usp_output csv, json; /* not open: not wanted */
    usp_result *results;
    size_t count, capacity;
} usp_report;

/* Opens the CSV and the JSON file and prints the header. */
usp_status usp_report_open(usp_report *report, const usp_options *options, usp_rank *rank);
/* A row: into the files, and onto the table. */
usp_status usp_report_add(usp_report *report, const usp_result *result, usp_tool_error *error);
usp_status usp_report_print(const usp_report *report, const usp_result *result, usp_tool_error *error);
/* Completes the two files and puts them in their places, also those of a run that failed half-way: `failure` is then
 * its sentence. One that failed before its first row leaves there what was there. */
usp_status usp_report_save(usp_report *report, const char *failure, usp_tool_error *error);
/* Prints the last lines; the files are saved before. */
void usp_report_close(usp_report *report);
/* Wrong elements of all rows; rows that ran. */
double usp_report_wrong(const usp_report *report);
size_t usp_report_rows(const usp_report *report);
/* Why rows were skipped: "8 rows: REASON; 2 rows: REASON", the first few reasons. */
void usp_report_reasons(const usp_report *report, char *text, size_t capacity);

/* usp_bench --info */
void usp_report_info(const usp_machine *machine);

#endif
