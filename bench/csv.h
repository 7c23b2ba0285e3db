/* csv.h - reads a table of comma-separated cells with a heading line.
 * Cells may stand in quotes, but hold no line breaks; a byte-order mark is passed over. */
#ifndef USP_CSV_H
#define USP_CSV_H
#include "tool.h"

typedef struct usp_csv {
    int columns;
    size_t rows; /* without the heading */
    char **cell; /* [rows + 1, columns], row 0 is the heading; points into text */
    char *text;
} usp_csv;

usp_status usp_csv_read(const char *path, usp_csv *csv, usp_tool_error *error);
void usp_csv_free(usp_csv *csv);
/* Index of a column, -1 if there is none. */
int usp_csv_column(const usp_csv *csv, const char *name);
/* Row 0 is the first one below the heading. */
const char *usp_csv_cell(const usp_csv *csv, size_t row, int column);
/* 1 if the cell is a finite number. */
int usp_csv_number(const usp_csv *csv, size_t row, int column, double *value);

#endif
