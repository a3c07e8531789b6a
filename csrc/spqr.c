/* Products with blocks of SpQR: what all instruction sets share. Inputs stay as they are but for rounding to 16 bits with one
 * scale a token; a dense part has them in its own order. Sums over a group are exact integers; groups are added in order.
 */
#include "spqr.h"

static int is_spqr(int kind) { return kind == BSTACK_SPQR || kind == BSTACK_OUTLIERS; }

size_t bstack_direct_lay_out(struct direct *direct, uint8_t *memory, size_t at) {
#define TAKE(pointer, bytes) ((pointer) = (void *)(memory ? memory + at : NULL), at += round_up((bytes), 64))
    const size_t t = (size_t)direct->tokens, n = (size_t)direct->columns;
    direct->used = 0;
    for (int i = 0; i < direct->count; i++)
        for (int level = 0; level < direct->matrices[i].count; level++)
            direct->used |= is_spqr(direct->matrices[i].kind[level]);
    if (!direct->used) return at;
    TAKE(direct->codes, sizeof(int16_t) * t * n);
    TAKE(direct->plain, sizeof(float) * t * n);
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
static void put_in_order(const struct dense *dense, const int16_t *codes, int columns, uint8_t *planes, float *sums) {
    for (int g = 0, p = 0; g < dense->groups; g++) {
        int32_t sum = 0;
        for (int s = 0; s < dense->subtiles; s++, planes += PLANES) {
            int16_t own[TILE] = {0};
            const int length = columns - p < TILE ? columns - p : TILE;
            for (int j = 0; j < length; j++, p++) own[j] = codes[load_16(dense->order + 2 * (size_t)p)];
            for (int j = 0; j < TILE; j++) {
                const int8_t low = (int8_t)own[j];
                sum += own[j];
                planes[j] = (uint8_t)((own[j] - low) >> 8);
                planes[TILE + j] = (uint8_t)low;
            }
        }
        sums[g] = (float)sum;
    }
}

void bstack_direct_prepare(struct direct *direct, int token, const float *x) {
    if (!direct->used) return;
    const int n = direct->columns;
    int16_t *codes = direct->codes + (size_t)token * (size_t)n;
    float *plain = direct->plain + (size_t)token * (size_t)n;
    direct->scale[token] = bstack_quantise(x, n, X_LIMIT, codes);
    for (int j = 0; j < n; j++) plain[j] = (float)codes[j];
    for (int i = 0; i < direct->count; i++)
        for (int level = 0; level < direct->matrices[i].count; level++) {
            if (direct->matrices[i].kind[level] != BSTACK_SPQR) continue;
            const struct dense dense = dense_of(direct->matrices + i, level);
            const struct ordered *to = &direct->ordered[i][level];
            put_in_order(&dense, codes, n, to->planes + (size_t)token * to->step, to->sums + (size_t)(token * dense.groups));
        }
}

void bstack_direct_multiply(const struct direct *direct, int which, int start, int rows, float *y) {
    const struct bstack_matrix *matrix = direct->matrices + which;
    const struct spqr_kernels *kernels = bstack_kernels()->spqr;
    const int tokens = direct->tokens;
    int any = 0;
    for (int level = 0; level < matrix->count; level++) any |= is_spqr(matrix->kind[level]);
    for (int i = start; i < start + rows; i += TILE) {
        const int own = start + rows - i < TILE ? start + rows - i : TILE;
        ALIGNED float sums[TILE * DIRECT_TOKENS];
        for (int k = 0; k < TILE * tokens; k++) sums[k] = 0.0f;
        for (int level = 0; level < matrix->count; level++)
            if (matrix->kind[level] == BSTACK_SPQR) {
                const struct dense dense = dense_of(matrix, level);
                const uint8_t *tiles = dense.tiles + (size_t)(i / TILE) * (size_t)dense.groups * dense.tile_bytes;
                kernels->dense(&dense, tiles, &direct->ordered[which][level], tokens, sums);
            } else if (matrix->kind[level] == BSTACK_OUTLIERS) {
                const struct outliers outliers = outliers_of(matrix, level);
                kernels->outliers(&outliers, outliers.pointer + 4 * (size_t)i, own, direct->plain, (size_t)direct->columns,
                                  tokens, sums);
            }
        for (int t = 0; t < tokens; t++)
            for (int k = 0; k < own; k++)
                y[(size_t)t * (size_t)matrix->rows + (size_t)(i + k)] = any ? direct->scale[t] * sums[t * TILE + k] : 0.0f;
    }
}

size_t bstack_spqr_row_bytes(const struct bstack_matrix *matrix, int level) {
    if (matrix->kind[level] == BSTACK_OUTLIERS)
        return 4 + 4 * (size_t)outliers_of(matrix, level).count / (size_t)matrix->rows;
    const struct dense dense = dense_of(matrix, level);
    return dense.tile_bytes * (size_t)dense.groups / TILE;
}
