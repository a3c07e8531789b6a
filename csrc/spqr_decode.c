/* Decode rows of SpQR blocks to floats. */
#include "spqr.h"

enum { RUN = 64 }; /* subtiles taken together, so that what a row needs of them stays in the nearest cache */

/* Unpack the 16 codes of one row of a subtile. */
static void unpack(const uint8_t *subtile, int bits, int row, uint8_t *code) {
    uint32_t four[4];
    if (bits == 4)
        for (int h = 0; h < 2; h++) {
            const uint32_t both = load_32(subtile + 64 * h + 4 * row);
            four[2 * h] = both & 0x0F0F0F0F;
            four[2 * h + 1] = both >> 4 & 0x0F0F0F0F;
        }
    else
        for (int j = 0; j < 4; j++) {
            const uint32_t third = subtile[64 + 8 * j + row / 2] >> 4 * (row & 1) & 15; /* bit i is for byte i */
            four[j] = (load_32(subtile + 4 * row) >> 2 * j & 0x03030303) | (third * 0x00204081 & 0x01010101) << 2;
        }
    memcpy(code, four, sizeof four);
}

/* Compute scale and zero of the 16 rows of a tile. */
static void statistics(const uint8_t *at, float *scale, float *zero) {
    float of[4];
    for (int k = 0; k < 4; k++) of[k] = half_to_float(at + 12 + 2 * k);
    for (int r = 0; r < TILE; r++) {
        const uint8_t *field = at + 3 * (r / 8);
        scale[r] = of[0] + of[1] * (float)(int)(load_32(field) >> 3 * (r % 8) & 7);
        zero[r] = of[2] + of[3] * (float)(int)(load_32(field + 6) >> 3 * (r % 8) & 7);
    }
}

/* Add some rows of one row tile, from row `first` on. */
static void add_tile(const struct dense *dense, const uint8_t *tiles, int columns, int first, int rows, float *out) {
    const int all = (columns + TILE - 1) / TILE;
    for (int start = 0; start < all; start += RUN) {
        const int count = all - start < RUN ? all - start : RUN;
        const int length = columns - start * TILE < count * TILE ? columns - start * TILE : count * TILE;
        const uint8_t *order = dense->order + 2 * (size_t)start * TILE, *subtile[RUN];
        float scale[RUN][TILE], zero[RUN][TILE];
        for (int k = 0; k < count; k++) {
            const uint8_t *tile = tiles + (size_t)((start + k) / dense->subtiles) * dense->tile_bytes;
            subtile[k] = tile + (size_t)((start + k) % dense->subtiles * dense->bits) * 32;
            statistics(tile + dense->tile_bytes - STATISTICS, scale[k], zero[k]);
        }
        for (int r = 0; r < rows; r++) {
            float *to = out + (size_t)r * (size_t)columns, value[RUN * TILE];
            uint8_t code[RUN * TILE];
            for (int k = 0; k < count; k++) unpack(subtile[k], dense->bits, first + r, code + k * TILE);
            for (int k = 0; k < count; k++)
                for (int j = k * TILE; j < (k + 1) * TILE; j++)
                    value[j] = scale[k][first + r] * ((float)code[j] - zero[k][first + r]);
            for (int p = 0; p < length; p++) to[load_16(order + 2 * p)] += value[p];
        }
    }
}

void bstack_dense_add_rows(const struct bstack_matrix *matrix, int level, int row, int rows, float *out) {
    const struct dense dense = dense_of(matrix, level);
    for (int done = 0, own; done < rows; done += own) {
        const int first = (row + done) % TILE;
        own = rows - done < TILE - first ? rows - done : TILE - first;
        const uint8_t *tiles = dense.tiles + (size_t)((row + done) / TILE) * (size_t)dense.groups * dense.tile_bytes;
        add_tile(&dense, tiles, matrix->columns, first, own, out + (size_t)done * (size_t)matrix->columns);
    }
}

void bstack_outliers_add_row(const struct bstack_matrix *matrix, int level, int row, float *out) {
    const struct outliers outliers = outliers_of(matrix, level);
    const size_t stop = load_32(outliers.pointer + 4 * (size_t)row + 4);
    for (size_t k = load_32(outliers.pointer + 4 * (size_t)row); k < stop; k++)
        out[load_16(outliers.index + 2 * k)] += half_to_float(outliers.value + 2 * k);
}
