/* csv.c - cuts a file's text into lines and cells in place.
 * Blank lines and lines that begin with '#' are left out. */
#include "csv.h"
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static char *read_text(const char *path, usp_tool_error *error) {
    size_t capacity = 1 << 16, length = 0;
    FILE *file = fopen(path, "r");
    if (!file) return usp_tool_fail(error, USP_INVALID, "%s: cannot open: %s", path, strerror(errno)), NULL;
    char *text = malloc(capacity);
    for (size_t got = 1; text && got;) {
        got = fread(text + length, 1, capacity - length - 1, file);
        length += got;
        if (length + 1 < capacity) continue;
        char *grown = realloc(text, capacity *= 2);
        if (!grown) free(text);
        text = grown;
    }
    int bad = ferror(file);
    fclose(file);
    if (!text) return usp_tool_fail(error, USP_NO_MEMORY, "%s: no memory for it", path), NULL;
    text[length] = 0;
    if (!bad && !memchr(text, 0, length)) return text;
    free(text);
    return usp_tool_fail(error, USP_INVALID, "%s: cannot be read as text", path), NULL;
}

/* The next line that counts, ended by 0, or NULL. */
static char *next_line(char **at) {
    while (**at) {
        char *line = *at;
        size_t length = strcspn(line, "\n");
        *at = line + length + (line[length] ? 1 : 0);
        line[length] = 0;
        if (length && line[length - 1] == '\r') line[--length] = 0;
        if (length && line[0] != '#') return line;
    }
    return NULL;
}

/* Where the cell at `text` ends, its comma or the end of the line; NULL if its quote does not end there. */
static char *cell_end(char *text) {
    if (*text != '"') return text + strcspn(text, ",");
    for (text++; *text && (*text != '"' || text[1] == '"'); text++) text += *text == '"';
    return *text && (!text[1] || text[1] == ',') ? text + 1 : NULL;
}

/* 0 if a quote does not end. */
static int count_cells(char *line) {
    char *end = cell_end(line);
    int cells = 1;
    for (; end && *end; cells++) end = cell_end(end + 1);
    return end ? cells : 0;
}

/* "a ""b""" -> a "b" */
static char *unquote(char *cell) {
    char *to = cell;
    if (*cell != '"') return cell;
    for (const char *from = cell + 1; *from != '"' || from[1] == '"'; from++) {
        from += *from == '"';
        *to++ = *from;
    }
    *to = 0;
    return cell;
}

static void cut_line(char *line, char **cell) {
    for (int more = 1; more;) {
        char *end = cell_end(line);
        more = *end;
        *end = 0;
        *cell++ = unquote(line);
        line = end + 1;
    }
}

static usp_status add_line(usp_csv *csv, const char *path, char *line, size_t *capacity, usp_tool_error *error) {
    size_t columns = (size_t)csv->columns;
    int cells = count_cells(line);
    if (!cells) return usp_tool_fail(error, USP_INVALID, "%s: row %zu has a quote without its end", path, csv->rows);
    if (cells != csv->columns)
        return usp_tool_fail(error, USP_INVALID, "%s: row %zu has %d cells, the heading %d", path, csv->rows, cells,
                             csv->columns);
    if (csv->rows == *capacity) {
        *capacity = *capacity ? 2 * *capacity : 64;
        char **grown = realloc(csv->cell, *capacity * columns * sizeof *grown);
        if (!grown) return usp_tool_fail(error, USP_NO_MEMORY, "%s: no memory for its cells", path);
        csv->cell = grown;
    }
    cut_line(line, csv->cell + csv->rows++ * columns);
    return USP_OK;
}

usp_status usp_csv_read(const char *path, usp_csv *csv, usp_tool_error *error) {
    size_t capacity = 0;
    usp_status status = USP_OK;
    *csv = (usp_csv){.text = read_text(path, error)};
    if (!csv->text) return USP_INVALID;
    char *at = csv->text + (strncmp(csv->text, "\xef\xbb\xbf", 3) ? 0 : 3);
    for (char *line = next_line(&at); line && status == USP_OK; line = next_line(&at)) {
        if (!csv->columns) csv->columns = count_cells(line);
        status = add_line(csv, path, line, &capacity, error);
    }
    if (status == USP_OK && csv->rows < 2) status = usp_tool_fail(error, USP_INVALID, "%s: has no rows", path);
    if (status != USP_OK)
        usp_csv_free(csv);
    else
        csv->rows--;
    return status;
}

void usp_csv_free(usp_csv *csv) {
    free(csv->cell);
    free(csv->text);
    *csv = (usp_csv){.columns = 0};
}

int usp_csv_column(const usp_csv *csv, const char *name) {
    for (int i = 0; i < csv->columns; i++)
        if (!strcmp(csv->cell[i], name)) return i;
    return -1;
}

const char *usp_csv_cell(const usp_csv *csv, size_t row, int column) {
    return csv->cell[(row + 1) * (size_t)csv->columns + (size_t)column];
}

int usp_csv_number(const usp_csv *csv, size_t row, int column, double *value) {
    return usp_parse_real(usp_csv_cell(csv, row, column), value);
}
