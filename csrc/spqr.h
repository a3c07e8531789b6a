/* Blocks of SpQR (format/SPEC.md, section 6): the dense part, tiles of 16 rows by one group of inputs, and the outliers. */
#ifndef BSTACK_SPQR_H
#define BSTACK_SPQR_H

#include "kernels.h"

enum {
    TILE = 16,       /* rows of a tile; inputs of a subtile, of which a group has 1, 2, 4 or 8 */
    STATISTICS = 20, /* bytes at the end of a tile: scale codes, zero codes, four halves */
    PLANES = 32,     /* bytes of 16 inputs: their high bytes, then their low ones, both signed, code = 256 high + low */
    QUADS = 4,       /* words of one of them: four inputs each */
    SPQR_ROWS = 32,  /* rows taken at once, at most: two tiles */
    SPQR_TOKENS = 8, /* tokens */
    LANES = 16,      /* partial sums of a row's outliers */
};

/* Where the parts of a dense part lie. */
struct dense {
    const uint8_t *order, *tiles;
    size_t tile_bytes;
    int bits, subtiles, groups;
};

static inline struct dense dense_of(const struct bstack_matrix *matrix, int level) {
    const int group = matrix->rank[level] / 16 * 16;
    const size_t n = (size_t)matrix->columns;
    struct dense dense = {.order = matrix->block[level], .bits = matrix->rank[level] % 16, .subtiles = group / TILE};
    dense.tiles = dense.order + round_up(2 * n, 64);
    dense.tile_bytes = (size_t)(group * dense.bits * TILE / 8) + STATISTICS;
    dense.groups = (int)((n + (size_t)group - 1) / (size_t)group);
    return dense;
}

/* Outliers: the row pointer, then inputs, then values. */
struct outliers {
    const uint8_t *pointer, *index, *value;
    uint32_t count;
};

static inline uint32_t load_32(const uint8_t *at) {
    uint32_t word;
    memcpy(&word, at, 4);
    return word;
}

static inline uint16_t load_16(const uint8_t *at) {
    uint16_t word;
    memcpy(&word, at, 2);
    return word;
}

static inline struct outliers outliers_of(const struct bstack_matrix *matrix, int level) {
    struct outliers found = {.pointer = matrix->block[level]};
    found.count = load_32(found.pointer + 4 * (size_t)matrix->rows);
    found.index = found.pointer + 4 * ((size_t)matrix->rows + 1);
    found.value = found.index + 2 * (size_t)found.count;
    return found;
}

/* The inputs of each token, rounded to 16 bits, as the SpQR blocks of all matrices of a call read them. */
struct spqr_job {
    const struct bstack_matrix *matrices;
    int count, tokens, columns, used; /* used: some matrix has such a block */
    int16_t *codes;                   /* tokens x columns */
    int16_t *own;                     /* tokens x width: room for the codes in another order */
    size_t width;
    float *scale;                     /* of each token */
    struct ordered {                  /* of a dense part: the codes in its order */
        uint8_t *planes;              /* of each token, `step` bytes apart */
        size_t step;
        float *sums;                  /* over each group, token by token */
    } (*ordered)[BSTACK_BLOCKS];
};

/* Lay out the arrays in memory from `at` on; returns where they end. With a null `memory`, only find the size. */
size_t bstack_spqr_lay_out(struct spqr_job *spqr, uint8_t *memory, size_t at);
/* Fill them for one token, x its inputs. */
void bstack_spqr_prepare(struct spqr_job *spqr, int token, const float *x);
/* Set rows start to start + rows - 1 of the product with matrix `which` to the sum of its SpQR blocks; start is a multiple of
 * SPQR_ROWS. Blocks come one after the other, so that inputs, which outliers read out of order, stay in the nearest cache. */
void bstack_spqr_multiply(const struct spqr_job *spqr, int which, int start, int rows, float *y);

/* Return the bytes of a row, on average. */
size_t bstack_spqr_row_bytes(const struct bstack_matrix *matrix, int level);
/* Add rows to out, as floats. */
void bstack_dense_add_rows(const struct bstack_matrix *matrix, int level, int row, int rows, float *out);
void bstack_outliers_add_row(const struct bstack_matrix *matrix, int level, int row, float *out);

/* One instruction set. Results are added to out[token * SPQR_ROWS + row]. */
struct spqr_kernels {
    /* Multiply with `tall` row tiles, 1 or 2, at `tiles`. For each row, from 0, add scale (sum code x - zero sum x) for each
     * group in turn, and round after each operation. `out` has room for two. */
    void (*dense)(const struct dense *dense, const uint8_t *tiles, int tall, const struct ordered *x, int tokens, float *out);
    /* Multiply the outliers of some rows with one token. `value` and `given`, the inputs as codes with room for 16 more, begin
     * with the first row's, at pointer[0]. Outlier l of a row goes to lane l mod 16; then the upper half of the lanes is
     * added to the lower, four times. */
    void (*outliers)(const uint8_t *pointer, int rows, const uint8_t *value, const int16_t *given, float *out);
};

#endif
