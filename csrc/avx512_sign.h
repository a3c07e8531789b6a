/* Sign blocks with AVX-512: the parts of struct kernels that avx512_sign.c implements. */
#ifndef BSTACK_AVX512_SIGN_H
#define BSTACK_AVX512_SIGN_H

#include <stddef.h>
#include <stdint.h>

enum { AVX512_TABLES = 512 }; /* bytes of the tables of a group of columns */

void bstack_avx512_tabulate(const int16_t *x, size_t groups, uint8_t *out);
void bstack_avx512_sum_signs(const uint8_t *bits, size_t stride, int width, int rows, const uint8_t *x, size_t step,
                             int operands, int64_t *sums);

#endif
