/* Multiply with SpQR blocks: what all instruction sets share. Inputs are not rotated, only rounded to 16 bits with one scale a
 * token; a dense part has them in its own order. Sums over a group are exact integers; groups are added in order.
 */
#include "spqr.h"

enum { SOME = 2048 }; /* outliers taken together */

static int is_spqr(int kind) { return kind == BSTACK_SPQR || kind == BSTACK_OUTLIERS; }

static int has_spqr(const struct bstack_matrix *matrix) {
    int found = 0;
    for (int level = 0; level < matrix->count; level++) found |= is_spqr(matrix->kind[level]);
    return found;
}

size_t bstack_spqr_lay_out(struct spqr_job *spqr, uint8_t *memory, size_t at) {
#define TAKE(pointer, bytes) ((pointer) = (void *)(memory ? memory + at : NULL), at += round_up((bytes), 64))
    const size_t t = (size_t)spqr->tokens, n = (size_t)spqr->columns;
    spqr->used = 0;
    for (int i = 0; i < spqr->count; i++) spqr->used |= has_spqr(spqr->matrices + i);
    if (!spqr->used) return at;
    TAKE(spqr->codes, sizeof(int16_t) * t * n);
    spqr->width = round_up(n, 8 * TILE);
    TAKE(spqr->own, sizeof(int16_t) * t * spqr->width);
    TAKE(spqr->scale, sizeof(float) * t);
    TAKE(spqr->ordered, sizeof(*spqr->ordered) * (size_t)spqr->count);
    for (int i = 0; i < spqr->count; i++)
        for (int level = 0; level < spqr->matrices[i].count; level++) {
            if (spqr->matrices[i].kind[level] != BSTACK_SPQR) continue;
            const struct dense dense = dense_of(spqr->matrices + i, level);
            struct ordered found = {.step = (size_t)(dense.groups * dense.subtiles) * PLANES};
            TAKE(found.planes, found.step * t);
            TAKE(found.sums, sizeof(float) * t * (size_t)dense.groups);
            if (memory) spqr->ordered[i][level] = found;
        }
#undef TAKE
    return at;
}

/* Put codes into the order of a dense part, in planes, and sum each group. */
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

void bstack_spqr_prepare(struct spqr_job *spqr, int token, const float *x) {
    if (!spqr->used) return;
    const int n = spqr->columns;
    int16_t *codes = spqr->codes + (size_t)token * (size_t)n;
    spqr->scale[token] = bstack_quantise(x, n, X_LIMIT, codes);
    for (int i = 0; i < spqr->count; i++)
        for (int level = 0; level < spqr->matrices[i].count; level++) {
            if (spqr->matrices[i].kind[level] != BSTACK_SPQR) continue;
            const struct dense dense = dense_of(spqr->matrices + i, level);
            const struct ordered *to = &spqr->ordered[i][level];
            put_in_order(&dense, codes, n, spqr->own + (size_t)token * spqr->width,
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

/* Set given[k] = codes[index[k]], two at a time, because the processor stores one word a cycle. */
static void gather_inputs(const int16_t *codes, const uint8_t *index, size_t count, int16_t *given) {
    size_t k = 0;
    _Pragma("GCC unroll 4")
    for (; k + 2 <= count; k += 2) {
        const uint32_t low = (uint16_t)codes[load_16(index + 2 * k)], high = (uint16_t)codes[load_16(index + 2 * k + 2)];
        const uint32_t both = low | high << 16;
        memcpy(given + k, &both, 4);
    }
    if (k < count) given[k] = codes[load_16(index + 2 * k)];
}

/* Fetch the inputs of outliers one by one, for as many rows as have room, then multiply them in order: faster than gather
 * instructions. */
static void add_outliers(const struct spqr_job *spqr, int which, int level, int first, int rows, float *sums) {
    const struct outliers outliers = outliers_of(spqr->matrices + which, level);
    int16_t given[SOME + LANES];
    memset(given + SOME, 0, sizeof *given * LANES);
    for (int t = 0; t < spqr->tokens; t++) {
        const int16_t *codes = spqr->codes + (size_t)t * (size_t)spqr->columns;
        float *out = sums + t * SPQR_ROWS;
        for (int i = 0, stop; i < rows; out += stop - i, i = stop) {
            const uint8_t *pointer = outliers.pointer + 4 * (size_t)(first + i);
            const size_t start = load_32(pointer);
            for (stop = i + 1; stop < rows && load_32(pointer + 4 * (stop + 1 - i)) - start <= SOME;) stop++;
            const size_t count = load_32(pointer + 4 * (stop - i)) - start;
            const uint8_t *index = outliers.index + 2 * start, *value = outliers.value + 2 * start;
            if (count > SOME) { /* one row, too long for the room */
                *out += long_row(index, value, count, codes);
                continue;
            }
            gather_inputs(codes, index, count, given);
            bstack_kernels()->spqr->outliers(pointer, stop - i, value, given, out);
        }
    }
}

static void add_dense(const struct spqr_job *spqr, int which, int level, int first, int rows, float *sums) {
    const struct dense dense = dense_of(spqr->matrices + which, level);
    const uint8_t *tiles = dense.tiles + (size_t)(first / TILE) * (size_t)dense.groups * dense.tile_bytes;
    bstack_kernels()->spqr->dense(&dense, tiles, (rows + TILE - 1) / TILE, &spqr->ordered[which][level], spqr->tokens, sums);
}

void bstack_spqr_multiply(const struct spqr_job *spqr, int which, int start, int rows, float *y) {
    const struct bstack_matrix *matrix = spqr->matrices + which;
    const size_t step = (size_t)matrix->rows;
    y += start;
    for (int t = 0; t < spqr->tokens; t++) memset(y + (size_t)t * step, 0, sizeof *y * (size_t)rows);
    if (!has_spqr(matrix)) return;
    for (int level = 0; level < matrix->count; level++)
        if (is_spqr(matrix->kind[level]))
            for (int i = 0; i < rows; i += SPQR_ROWS) {
                const int own = rows - i < SPQR_ROWS ? rows - i : SPQR_ROWS;
                ALIGNED float sums[SPQR_ROWS * SPQR_TOKENS];
                memset(sums, 0, sizeof *sums * (size_t)(SPQR_ROWS * spqr->tokens));
                (matrix->kind[level] == BSTACK_SPQR ? add_dense : add_outliers)(spqr, which, level, start + i, own, sums);
                for (int t = 0; t < spqr->tokens; t++)
                    for (int k = 0; k < own; k++) y[(size_t)t * step + (size_t)(i + k)] += sums[t * SPQR_ROWS + k];
            }
    for (int t = 0; t < spqr->tokens; t++)
        for (int i = 0; i < rows; i++) y[(size_t)t * step + (size_t)i] *= spqr->scale[t];
}

size_t bstack_spqr_row_bytes(const struct bstack_matrix *matrix, int level) {
    if (matrix->kind[level] == BSTACK_OUTLIERS)
        return 4 + 4 * (size_t)outliers_of(matrix, level).count / (size_t)matrix->rows;
    const struct dense dense = dense_of(matrix, level);
    return dense.tile_bytes * (size_t)dense.groups / TILE;
}
