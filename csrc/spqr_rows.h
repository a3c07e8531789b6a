/* The loops of SpQR for instruction sets whose registers hold ROWS rows, fewer than a tile, one in each lane. A file defines
 * ROWS, includes this, and defines the steps declared here. */
#ifndef BSTACK_SPQR_ROWS_H
#define BSTACK_SPQR_ROWS_H

#include "spqr.h"
#include "tiles.h"

typedef float floats __attribute__((vector_size(4 * ROWS)));
typedef int32_t words __attribute__((vector_size(4 * ROWS)));
typedef int8_t codes __attribute__((vector_size(4 * ROWS))); /* of four inputs of each row */

/* Each step takes the ROWS rows of a tile from row ROWS part on. */

/* Set code[j] to their codes of inputs 4 j to 4 j + 3 of a subtile. */
INLINE void unpack(const uint8_t *subtile, int bits, int part, codes *code);
/* Sum the products of their codes with the 16 inputs at `planes`. */
INLINE words product_of(const codes *code, const uint8_t *planes);
/* Compute their scales and zeros from a tile's statistics at `at`. */
INLINE void statistics(const uint8_t *at, int part, floats *scale, floats *zero);
INLINE floats to_floats(words numbers);
/* Add the products of 16 outliers to their lanes. */
INLINE void add_products(const uint8_t *value, const int16_t *given, floats *lanes);
/* Sum 16 lanes in the order of struct spqr_kernels. */
INLINE float sum_lanes(const floats *lanes);

/* Multiply a part of a row tile with one or two tokens. */
INLINE void part_of_tile(const struct dense *dense, int bits, int part, const uint8_t *tile, const struct ordered *x, int first,
                         int deep, float *out) {
    const uint8_t *planes = x->planes + (size_t)first * x->step;
    const float *sums = x->sums + (size_t)first * (size_t)dense->groups;
    floats total[2];
    UNROLL
    for (int t = 0; t < deep; t++) total[t] = (floats){0};
    for (int g = 0; g < dense->groups; g++, sums++) {
        words product[2];
        UNROLL
        for (int t = 0; t < deep; t++) product[t] = (words){0};
        for (int s = 0; s < dense->subtiles; s++, tile += bits * 32, planes += PLANES) {
            codes code[QUADS];
            unpack(tile, bits, part, code);
            UNROLL
            for (int t = 0; t < deep; t++) product[t] += product_of(code, planes + (size_t)t * x->step);
        }
        floats scale, zero;
        statistics(tile, part, &scale, &zero);
        tile += STATISTICS;
        UNROLL
        for (int t = 0; t < deep; t++) total[t] += scale * (to_floats(product[t]) - zero * sums[t * dense->groups]);
    }
    UNROLL
    for (int t = 0; t < deep; t++) {
        float *to = out + (first + t) * SPQR_ROWS + part * ROWS;
        floats before;
        memcpy(&before, to, sizeof before);
        before += total[t];
        memcpy(to, &before, sizeof before);
    }
}

INLINE void row_tile(const struct dense *dense, int bits, const uint8_t *tiles, const struct ordered *x, int tokens, float *out) {
    for (int part = 0; part < TILE / ROWS; part++) {
        int t = 0;
        for (; t + 2 <= tokens; t += 2) part_of_tile(dense, bits, part, tiles, x, t, 2, out);
        for (; t < tokens; t++) part_of_tile(dense, bits, part, tiles, x, t, 1, out);
    }
}

static void dense(const struct dense *dense, const uint8_t *tiles, int tile_rows, const struct ordered *x, int tokens, float *out) {
    for (; tile_rows; tile_rows--, tiles += (size_t)dense->groups * dense->tile_bytes, out += TILE)
        if (dense->bits == 4)
            row_tile(dense, 4, tiles, x, tokens, out);
        else
            row_tile(dense, 3, tiles, x, tokens, out);
}

static void outliers(const uint8_t *pointer, int rows, const uint8_t *value, const int16_t *given, float *out) {
    for (int i = 0; i < rows; i++, pointer += 4) {
        const size_t count = load_32(pointer + 4) - load_32(pointer);
        floats lanes[LANES / ROWS] = {{0}};
        size_t k = 0;
        for (; k + LANES <= count; k += LANES) add_products(value + 2 * k, given + k, lanes);
        if (k < count) {
            uint8_t last[2 * LANES] = {0}; /* zeros fill up the rest */
            memcpy(last, value + 2 * k, 2 * (count - k));
            add_products(last, given + k, lanes);
        }
        out[i] += sum_lanes(lanes);
        value += 2 * count;
        given += count;
    }
}

#endif
