/* Products with blocks of SpQR: what all instruction sets share. Inputs stay as they are but for rounding to 16 bits with one
 * scale a token; a dense part has them in its own order. Sums over a group are exact integers; groups are added in order.
 */
#include "spqr.h"

enum { SOME = 2048 }; /* outliers taken together */

static int is_spqr(int kind) { return kind == BSTACK_SPQR || kind == BSTACK_OUTLIERS; }

static int has_spqr(const struct bstack_matrix *matrix) {
    int found = 0;
    for (int level = 0; level < matrix->count; level++) found |= is_spqr(matrix->kind[level]);
    return found;
}

size_t bstack_direct_lay_out(struct direct *direct, uint8_t *memory, size_t at) {
#define TAKE(pointer, bytes) ((pointer) = (void *)(memory ? memory + at : NULL), at += round_up((bytes), 64))
    const size_t t = (size_t)direct->tokens, n = (size_t)direct->columns;
    direct->used = 0;
    for (int i = 0; i < direct->count; i++) direct->used |= has_spqr(direct->matrices + i);
    if (!direct->used) return at;
    TAKE(direct->codes, sizeof(int16_t) * t * n);
    direct->width = round_up(n, 8 * TILE);
    TAKE(direct->own, sizeof(int16_t) * t * direct->width);
    TAKE(direct->scale, sizeof(float) * t);
    TAKE(direct->ordered, sizeof(*direct->ordered) * (size_t)direct->count);
    for (int i = 0; i < direct->count; i++)
        for (int level = 0; level < direct->matrices[i].count; level++) {
            if (direct->matrices[i].kind[level] != BSTACK_SPQR) continue;
            const struct dense dense = dense_of(direct->matrices + i, level);
            struct ordered found = {.step = (size_t)(dense.groups * dense.subtiles) * PLANES};
            TAKE(found.planes, found.step * t);
            TAKE(found.sums, sizeof(float) * t * (size_t)dense.groups);
            if (memory) direct->ordered[i][level] = found;
        }
#undef TAKE
    return at;
}

/* Codes in the order of a dense part, in planes, and their sums. */
static void put_in_order(const struct dense *dense, const int16_t *codes, int columns, int16_t *own, uint8_t *planes,
                         float *sums) {
    const int width = dense->groups * dense->subtiles * TILE;
    for (int p = 0; p < columns; p++) own[p] = codes[load_16(dense->order + 2 * (size_t)p)];
    memset(own + columns, 0, sizeof *own * (size_t)(width - columns));
    for (int p = 0; p < width; p += TILE, planes += PLANES)
        for (int j = 0; j < TILE; j++) {
            const int8_t low = (int8_t)own[p + j];
            planes[j] = (uint8_t)((own[p + j] - low) >> 8);
            planes[TILE + j] = (uint8_t)low;
        }
    for (int g = 0; g < dense->groups; g++) {
        int32_t sum = 0;
        for (int j = 0; j < dense->subtiles * TILE; j++) sum += *own++;
        sums[g] = (float)sum;
    }
}

void bstack_direct_prepare(struct direct *direct, int token, const float *x) {
    if (!direct->used) return;
    const int n = direct->columns;
    int16_t *codes = direct->codes + (size_t)token * (size_t)n;
    direct->scale[token] = bstack_quantise(x, n, X_LIMIT, codes);
    for (int i = 0; i < direct->count; i++)
        for (int level = 0; level < direct->matrices[i].count; level++) {
            if (direct->matrices[i].kind[level] != BSTACK_SPQR) continue;
            const struct dense dense = dense_of(direct->matrices + i, level);
            const struct ordered *to = &direct->ordered[i][level];
            put_in_order(&dense, codes, n, direct->own + (size_t)token * direct->width,
                         to->planes + (size_t)token * to->step, to->sums + (size_t)(token * dense.groups));
        }
}

static float long_row(const uint8_t *index, const uint8_t *value, size_t count, const int16_t *codes) {
    float lane[LANES] = {0};
    for (size_t k = 0; k < count; k++)
        lane[k % LANES] += half_to_float(value + 2 * k) * (float)codes[load_16(index + 2 * k)];
    for (int half = LANES / 2; half; half /= 2)
        for (int l = 0; l < half; l++) lane[l] += lane[l + half];
    return lane[0];
}

/* given[k] = codes[index[k]]. Two at a time, as the processor stores no more than one word a cycle. */
static void fetch(const int16_t *codes, const uint8_t *index, size_t count, int16_t *given) {
    size_t k = 0;
    _Pragma("GCC unroll 4")
    for (; k + 2 <= count; k += 2) {
        const uint32_t low = (uint16_t)codes[load_16(index + 2 * k)], high = (uint16_t)codes[load_16(index + 2 * k + 2)];
        const uint32_t both = low | high << 16;
        memcpy(given + k, &both, 4);
    }
    if (k < count) given[k] = codes[load_16(index + 2 * k)];
}

/* Inputs of outliers are fetched one by one, for as many rows as have room, and then multiplied in order: faster than
 * instructions that fetch many. */
static void add_outliers(const struct direct *direct, int which, int level, int first, int rows, float *sums) {
    const struct outliers outliers = outliers_of(direct->matrices + which, level);
    int16_t given[SOME + LANES];
    memset(given + SOME, 0, sizeof *given * LANES);
    for (int t = 0; t < direct->tokens; t++) {
        const int16_t *codes = direct->codes + (size_t)t * (size_t)direct->columns;
        float *out = sums + t * DIRECT_ROWS;
        for (int i = 0, stop; i < rows; out += stop - i, i = stop) {
            const uint8_t *pointer = outliers.pointer + 4 * (size_t)(first + i);
            const size_t start = load_32(pointer);
            for (stop = i + 1; stop < rows && load_32(pointer + 4 * (stop + 1 - i)) - start <= SOME;) stop++;
            const size_t count = load_32(pointer + 4 * (stop - i)) - start;
            const uint8_t *index = outliers.index + 2 * start, *value = outliers.value + 2 * start;
            if (count > SOME) { /* one row, with room for none */
                *out += long_row(index, value, count, codes);
                continue;
            }
            fetch(codes, index, count, given);
            bstack_kernels()->spqr->outliers(pointer, stop - i, value, given, out);
        }
    }
}

static void add_dense(const struct direct *direct, int which, int level, int first, int rows, float *sums) {
    const struct dense dense = dense_of(direct->matrices + which, level);
    const uint8_t *tiles = dense.tiles + (size_t)(first / TILE) * (size_t)dense.groups * dense.tile_bytes;
    bstack_kernels()->spqr->dense(&dense, tiles, (rows + TILE - 1) / TILE, &direct->ordered[which][level], direct->tokens, sums);
}

void bstack_direct_multiply(const struct direct *direct, int which, int start, int rows, float *y) {
    const struct bstack_matrix *matrix = direct->matrices + which;
    const size_t step = (size_t)matrix->rows;
    y += start;
    for (int t = 0; t < direct->tokens; t++) memset(y + (size_t)t * step, 0, sizeof *y * (size_t)rows);
    if (!has_spqr(matrix)) return;
    for (int level = 0; level < matrix->count; level++)
        if (is_spqr(matrix->kind[level]))
            for (int i = 0; i < rows; i += DIRECT_ROWS) {
                const int own = rows - i < DIRECT_ROWS ? rows - i : DIRECT_ROWS;
                ALIGNED float sums[DIRECT_ROWS * DIRECT_TOKENS];
                memset(sums, 0, sizeof *sums * (size_t)(DIRECT_ROWS * direct->tokens));
                (matrix->kind[level] == BSTACK_SPQR ? add_dense : add_outliers)(direct, which, level, start + i, own, sums);
                for (int t = 0; t < direct->tokens; t++)
                    for (int k = 0; k < own; k++) y[(size_t)t * step + (size_t)(i + k)] += sums[t * DIRECT_ROWS + k];
            }
    for (int t = 0; t < direct->tokens; t++)
        for (int i = 0; i < rows; i++) y[(size_t)t * step + (size_t)i] *= direct->scale[t];
}

size_t bstack_spqr_row_bytes(const struct bstack_matrix *matrix, int level) {
    if (matrix->kind[level] == BSTACK_OUTLIERS)
        return 4 + 4 * (size_t)outliers_of(matrix, level).count / (size_t)matrix->rows;
    const struct dense dense = dense_of(matrix, level);
    return dense.tile_bytes * (size_t)dense.groups / TILE;
}
