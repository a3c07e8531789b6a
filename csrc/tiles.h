/* Shared by instruction sets: cut a sum over rows and operands into tiles whose accumulators fit the registers. */
#ifndef BSTACK_TILES_H
#define BSTACK_TILES_H

#include "kernels.h"

/* As in struct kernels. */
#define SUM_ARGUMENTS                                                                                                 \
    const uint8_t *packed, size_t stride, int width, int rows, const uint8_t *x, size_t step, int operands, int64_t *sums

/* Add the sums of a tile; `sums` points to the first. Rows of one operand are neighbours, operands are `rows` apart. */
#define TILE_ARGUMENTS \
    const uint8_t *packed, size_t stride, int width, const uint8_t *x, size_t step, int64_t *sums, int rows
typedef void tile(TILE_ARGUMENTS);

/* Cut into tiles of rows x operands: as many operands as are left, and as many rows as fit beside them. */
static inline void for_each_tile(const uint8_t *packed, size_t stride, int width, int rows, const uint8_t *x, size_t step,
                                 int operands, int64_t *sums, tile *by_4x1, tile *by_4x2, tile *by_2x4, tile *by_1x1) {
    for (int i = 0; i < rows;) {
        const int left = rows - i, tile_rows = left >= 4 ? 4 : left >= 2 && operands >= 4 ? 2 : 1;
        for (int o = 0; o < operands;) {
            const int depth = tile_rows == 1 ? 1 : operands - o >= 4 ? 4 : tile_rows == 2 || operands - o < 2 ? 1 : 2;
            const uint8_t *codes = packed + (size_t)i * stride, *in = x + (size_t)o * step;
            int64_t *to = sums + (size_t)o * (size_t)rows + i;
            if (depth == 4)
                for (int e = 0; e < tile_rows; e += 2) by_2x4(codes + (size_t)e * stride, stride, width, in, step, to + e, rows);
            else if (tile_rows == 4)
                (depth == 2 ? by_4x2 : by_4x1)(codes, stride, width, in, step, to, rows);
            else
                for (int e = 0; e < tile_rows; e++) by_1x1(codes + (size_t)e * stride, stride, width, in, step, to + e, rows);
            o += depth;
        }
        i += tile_rows;
    }
}

/* Define the sums NAME of an instruction set from NAME_row, which takes one row and 1, 2, 4 or 8 operands. */
#define ROW_BY_ROW(NAME)                                                                  \
    static void NAME(SUM_ARGUMENTS) {                                                     \
        for (int i = 0; i < rows; i++, packed += stride, sums++) {                        \
            int o = 0;                                                                    \
            for (; o + 8 <= operands; o += 8)                                             \
                NAME##_row(packed, stride, width, x + (size_t)o * step, step, 8,          \
                           sums + (size_t)o * (size_t)rows, rows);                        \
            for (; o + 4 <= operands; o += 4)                                             \
                NAME##_row(packed, stride, width, x + (size_t)o * step, step, 4,          \
                           sums + (size_t)o * (size_t)rows, rows);                        \
            for (; o + 2 <= operands; o += 2)                                             \
                NAME##_row(packed, stride, width, x + (size_t)o * step, step, 2,          \
                           sums + (size_t)o * (size_t)rows, rows);                        \
            for (; o < operands; o++)                                                     \
                NAME##_row(packed, stride, width, x + (size_t)o * step, step, 1,          \
                           sums + (size_t)o * (size_t)rows, rows);                        \
        }                                                                                 \
    }

/* Define the function decode5 of an instruction set from decode5_blocks, which takes a constant number of blocks. */
#define DECODE5                                                                                                            \
    static void decode5(const uint8_t *const *codes, const float *scale, int blocks, int columns, int zeros, float *out) { \
        switch (blocks) {                                                                                                  \
        case 1: decode5_blocks(codes, scale, 1, columns, zeros, out); break;                                               \
        case 2: decode5_blocks(codes, scale, 2, columns, zeros, out); break;                                               \
        case 3: decode5_blocks(codes, scale, 3, columns, zeros, out); break;                                               \
        default: decode5_blocks(codes, scale, STACKED, columns, zeros, out);                                               \
        }                                                                                                                  \
    }

/* Copy the last `left` bytes of `count` code rows to rows of `wide` bytes that end in zeros. */
INLINE void copy_rest(uint8_t *rest, int wide, const uint8_t *codes, size_t stride, int left, int count) {
    memset(rest, 0, (size_t)(count * wide));
    for (int e = 0; e < count; e++) memcpy(rest + e * wide, codes + (size_t)e * stride, (size_t)left);
}

/* Return where the inputs of code byte b begin, first quarter first, for codes in their plain order. */
INLINE const uint8_t *inputs_of(const uint8_t *x, int b) {
    return x + (size_t)(b / GROUP) * QUARTERS * OPERAND + (size_t)(b % GROUP) * 2;
}

#endif
