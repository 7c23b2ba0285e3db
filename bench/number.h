/* number.h - elements of the library's dtypes as doubles, and the pseudo-random numbers of test tensors.
 * Written apart from the library's own conversions, so that it can check them. */
#ifndef USP_NUMBER_H
#define USP_NUMBER_H
#include <usp.h>

double usp_number_load(usp_dtype dtype, const void *data, size_t index);
void usp_number_store(usp_dtype dtype, void *data, size_t index, double value); /* round to nearest even */
double usp_number_round(usp_dtype dtype, double value);
/* Distance from 1 to the next number. */
double usp_number_epsilon(usp_dtype dtype);

/* Element `index` of stream `stream`: mean 0, variance 1, nearly normal, |x| < 3.5. Any element at once, in any order.
 */
double usp_number_random(uint64_t stream, uint64_t index);
/* `count` of them from `first` on, rounded to the dtype: as doubles, or stored at elements 0 .. count of data. */
void usp_number_random_row(usp_dtype dtype, uint64_t stream, uint64_t first, int count, double *row);
void usp_number_random_fill(usp_dtype dtype, uint64_t stream, uint64_t first, size_t count, void *data);
uint64_t usp_number_hash(uint64_t stream, uint64_t index);

#endif
