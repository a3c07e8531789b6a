/* The sums in plain C, for every CPU; other instruction sets compute the same faster. */
#include "kernels.h"

static void arrange(int16_t *x, size_t groups) {
    (void)x;
    (void)groups;
}

static void trellis(const uint8_t *codes, size_t stride, int width, int rows, const uint8_t *x, size_t step, int operands,
                    int64_t *sums) {
    for (int i = 0; i < rows; i++, codes += stride)
        for (int b = 0; b < width; b++) {
            const unsigned d = codes[b], c = codes[b + stride], e = codes[b + 2 * stride], f = codes[b + 3 * stride];
            int32_t value[QUARTERS];
            for (int k = 0; k < QUARTERS; k++) {
                const int shift = 2 * k;
                value[k] = bstack_table[(f >> shift & 3) | (e >> shift & 3) << 2 | (c >> shift & 3) << 4 |
                                        (d >> shift & 3) << 6];
            }
            const size_t at = (size_t)(b / GROUP) * QUARTERS * GROUP + (size_t)(b % GROUP);
            for (int o = 0; o < operands; o++) {
                const int16_t *row = (const int16_t *)(x + (size_t)o * step) + at;
                int32_t sum = 0;
                for (int k = 0; k < QUARTERS; k++) sum += value[k] * row[k * GROUP];
                sums[o * rows + i] += sum;
            }
        }
}

static void sign(const uint8_t *bits, size_t stride, int width, int rows, const uint8_t *x, size_t step, int operands,
                 int64_t *sums) {
    for (int i = 0; i < rows; i++, bits += stride)
        for (int o = 0; o < operands; o++) {
            const int16_t *row = (const int16_t *)(x + (size_t)o * step);
            int64_t sum = 0;
            for (int b = 0; b < width; b++)
                for (int k = 0; k < 8; k++) sum += (int32_t)(bits[b] >> k & 1) * row[b * 8 + k];
            sums[o * rows + i] += sum;
        }
}

const struct kernels bstack_portable = {
    .name = "portable",
    .arrange = arrange,
    .trellis = trellis,
    .sign = sign,
    .spqr = &bstack_spqr_portable,
};
