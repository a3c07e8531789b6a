/* SpQR in plain C, for every CPU; other instruction sets compute the same faster. */
#include "spqr.h"

/* Return the code of a row and column j of a subtile; of 3 bits, the low two and the third are stored apart. */
static int code_of(const uint8_t *subtile, int bits, int row, int j) {
    if (bits == 4) return subtile[64 * (j / 8) + 4 * row + j % 4] >> (j & 4) & 15;
    const int bit = 4 * row + j % 4;
    return (subtile[bit] >> 2 * (j / 4) & 3) | (subtile[64 + 8 * (j / 4) + bit / 8] >> bit % 8 & 1) << 2;
}

static void row_tile(const struct dense *dense, const uint8_t *tile, const struct ordered *x, int tokens, float *out) {
    const int inputs = dense->subtiles * TILE;
    const size_t subtile_bytes = (size_t)dense->bits * 32;
    float total[TILE * SPQR_TOKENS] = {0};
    for (int g = 0; g < dense->groups; g++, tile += dense->tile_bytes) {
        const uint8_t *at = tile + dense->tile_bytes - STATISTICS;
        float s[2], z[2];
        for (int k = 0; k < 2; k++) {
            s[k] = half_to_float(at + 12 + 2 * k);
            z[k] = half_to_float(at + 16 + 2 * k);
        }
        for (int r = 0; r < TILE; r++) {
            const uint8_t *field = at + 3 * (r / 8);
            const float scale = s[0] + s[1] * (float)(load_32(field) >> 3 * (r % 8) & 7);
            const float zero = z[0] + z[1] * (float)(load_32(field + 6) >> 3 * (r % 8) & 7);
            int32_t sum[SPQR_TOKENS] = {0};
            for (int j = 0; j < inputs; j++) {
                const int code = code_of(tile + (size_t)(j / TILE) * subtile_bytes, dense->bits, r, j % TILE);
                const uint8_t *plane = x->planes + (size_t)(g * dense->subtiles + j / TILE) * PLANES + j % TILE;
                for (int t = 0; t < tokens; t++, plane += x->step)
                    sum[t] += code * (256 * (int8_t)plane[0] + (int8_t)plane[TILE]);
            }
            for (int t = 0; t < tokens; t++)
                total[t * TILE + r] += scale * ((float)sum[t] - zero * x->sums[t * dense->groups + g]);
        }
    }
    for (int t = 0; t < tokens; t++)
        for (int r = 0; r < TILE; r++) out[t * SPQR_ROWS + r] += total[t * TILE + r];
}

static void dense(const struct dense *dense, const uint8_t *tiles, int tile_rows, const struct ordered *x, int tokens, float *out) {
    for (; tile_rows; tile_rows--, tiles += (size_t)dense->groups * dense->tile_bytes, out += TILE)
        row_tile(dense, tiles, x, tokens, out);
}

static void outliers(const uint8_t *pointer, int rows, const uint8_t *value, const int16_t *given, float *out) {
    for (int i = 0; i < rows; i++, pointer += 4) {
        float lane[LANES] = {0};
        const uint32_t count = load_32(pointer + 4) - load_32(pointer);
        for (uint32_t k = 0; k < count; k++, value += 2) lane[k % LANES] += half_to_float(value) * (float)*given++;
        for (int half = LANES / 2; half; half /= 2)
            for (int l = 0; l < half; l++) lane[l] += lane[l + half];
        out[i] += lane[0];
    }
}

const struct spqr_kernels bstack_spqr_portable = {dense, outliers};
