/* Rows of SpQR's blocks as floats. */
#include "spqr.h"

/* The 16 codes of one row of a subtile. */
static void unpack(const uint8_t *subtile, int bits, int row, uint8_t *code) {
    const uint8_t *at = subtile + 4 * row;
    if (bits == 4) {
        for (int h = 0; h < 2; h++, at += 64)
            for (int i = 0; i < 4; i++) {
                code[8 * h + i] = at[i] & 15;
                code[8 * h + 4 + i] = at[i] >> 4;
            }
        return;
    }
    for (int j = 0; j < 4; j++) {
        const int third = subtile[64 + 8 * j + row / 2] >> 4 * (row & 1);
        for (int i = 0; i < 4; i++) code[4 * j + i] = (uint8_t)((at[i] >> 2 * j & 3) | (third >> i & 1) << 2);
    }
}

void bstack_dense_add_row(const struct bstack_matrix *matrix, int level, int row, float *out) {
    const struct dense dense = dense_of(matrix, level);
    const size_t subtile_bytes = (size_t)dense.bits * 32;
    const uint8_t *tile = dense.tiles + (size_t)(row / TILE) * (size_t)dense.groups * dense.tile_bytes;
    const uint8_t *order = dense.order;
    const int r = row % TILE, shift = 3 * (r % 8);
    for (int g = 0, left = matrix->columns; g < dense.groups; g++, tile += dense.tile_bytes) {
        const uint8_t *at = tile + (size_t)dense.subtiles * subtile_bytes, *field = at + 3 * (r / 8);
        const int c = (int)(load_32(field) >> shift & 7), k = (int)(load_32(field + 6) >> shift & 7);
        const float scale = half_to_float(at + 12) + half_to_float(at + 14) * (float)c;
        const float zero = half_to_float(at + 16) + half_to_float(at + 18) * (float)k;
        for (int s = 0; s < dense.subtiles && left > 0; s++, left -= TILE, order += 2 * TILE) {
            uint8_t code[TILE];
            float value[TILE];
            unpack(tile + (size_t)s * subtile_bytes, dense.bits, r, code);
            for (int j = 0; j < TILE; j++) value[j] = scale * ((float)code[j] - zero);
            const int length = left < TILE ? left : TILE;
            for (int j = 0; j < length; j++) out[load_16(order + 2 * j)] += value[j];
        }
    }
}

void bstack_outliers_add_row(const struct bstack_matrix *matrix, int level, int row, float *out) {
    const struct outliers outliers = outliers_of(matrix, level);
    const size_t stop = load_32(outliers.pointer + 4 * (size_t)row + 4);
    for (size_t k = load_32(outliers.pointer + 4 * (size_t)row); k < stop; k++)
        out[load_16(outliers.index + 2 * k)] += half_to_float(outliers.value + 2 * k);
}
