/* Encode trellis blocks: a Viterbi search down the rows of each column, with error feedback between columns.
 *
 * Window of row i:   w_i = code_i + 4 code_{i-1} + 16 code_{i-2} + 64 code_{i-3};    value of row i = table[w_i].
 * A state is the part of a window that the next row sees: 64 of them, 4 codes lead out of each. The codes of three rows
 * before the first are stored too, so the search may start in any state.
 *
 * Every float operation is a plain IEEE single operation in a fixed order (built with -ffp-contract=off), so that the
 * reference in bstack/kernels/reference.py gives the same codes on every machine.
 */
#include "kernels.h"

#include <stdlib.h>

enum { BITS = 2, CODES = 1 << BITS, WINDOWS = 256, STATES = WINDOWS / CODES };

/* Search one row: from the costs of the 64 states before it, the costs after it and the oldest code on the way to each.
 *
 * The window w follows the state w >> 2, its low bits are the new code. Windows that differ in their oldest code alone
 * lead to the same state, so the last loops compare four runs of 64 neighbours. (Compilers vectorise loops of 64 and more;
 * they unroll shorter ones first and then do not vectorise them.)
 */
INLINE void advance(float x, float weight, const float *restrict table, const float *restrict before, float *restrict after,
                    uint8_t *restrict from) {
    float cost[WINDOWS];
    int32_t oldest[STATES];
    for (int p = 0; p < STATES; p++) {
        cost[4 * p] = before[p];
        cost[4 * p + 1] = before[p];
        cost[4 * p + 2] = before[p];
        cost[4 * p + 3] = before[p];
    }
    for (int w = 0; w < WINDOWS; w++) {
        float d = x - table[w];
        cost[w] = cost[w] + weight * (d * d);
    }
    for (int s = 0; s < STATES; s++) {
        after[s] = cost[s];
        oldest[s] = 0;
    }
    for (int o = 1; o < CODES; o++)
        for (int s = 0; s < STATES; s++) {
            const float other = cost[o * STATES + s];
            oldest[s] = other < after[s] ? o : oldest[s];
            after[s] = other < after[s] ? other : after[s];
        }
    for (int s = 0; s < STATES; s++) from[s] = (uint8_t)oldest[s];
}

/* Find the cheapest path through one column.
 *
 * x, weight: rows' targets (already divided by the row scales) and cost weights; back: rows * STATES bytes of scratch.
 * Writes EARLIER + rows codes and rows table values.
 */
EACH_CPU
static void search_column(const float *restrict x, const float *restrict weight, int rows, const float *restrict table,
                          uint8_t *restrict code, float *restrict value, uint8_t *restrict back) {
    float even[STATES], odd[STATES];
    float *before = even, *after = odd;
    for (int s = 0; s < STATES; s++) before[s] = 0.0f;
    for (int i = 0; i < rows; i++) {
        advance(x[i], weight[i], table, before, after, back + (size_t)i * STATES);
        if ((i & 15) == 15) { /* keep the sums small, so that single precision is fine enough */
            const float zero = after[0];
            for (int s = 0; s < STATES; s++) after[s] -= zero;
        }
        float *swap = before;
        before = after;
        after = swap;
    }
    int state = 0;
    for (int s = 1; s < STATES; s++)
        if (before[s] < before[state]) state = s;
    for (int i = rows - 1; i >= 0; i--) {
        int w = state + back[(size_t)i * STATES + state] * STATES;
        code[EARLIER + i] = (uint8_t)(w & (CODES - 1));
        value[i] = table[w];
        state = w >> BITS;
    }
    for (int i = EARLIER - 1; i >= 0; i--) {
        code[i] = (uint8_t)(state & (CODES - 1));
        state >>= BITS;
    }
}

/* Encode a group of columns, each stored contiguously.
 *
 * target:   columns * rows, what each column should become; changed by the feedback of the columns before it.
 * original: columns * rows, what the error is measured against.
 * feedback: columns * columns, [j][t] = part of column j's error that column t > j makes up for.
 * scale, weight: rows.    code: columns * (EARLIER + rows), error: columns * rows, both written.
 * Returns 0, or 1 when there is no memory.
 */
int bstack_trellis_encode(float *target, const float *original, int columns, int rows, const float *feedback,
                          const float *table, const float *scale, const float *weight, uint8_t *code, float *error) {
    float *x = malloc(sizeof(float) * (size_t)rows * 3);
    uint8_t *back = malloc((size_t)rows * STATES);
    if (!x || !back) {
        free(x);
        free(back);
        return 1;
    }
    float *value = x + rows, *inverse = x + 2 * (size_t)rows;
    for (int i = 0; i < rows; i++) inverse[i] = 1.0f / scale[i];
    for (int j = 0; j < columns; j++) {
        const size_t at = (size_t)j * (size_t)rows;
        for (int i = 0; i < rows; i++) x[i] = target[at + i] * inverse[i];
        search_column(x, weight, rows, table, code + at + (size_t)j * EARLIER, value, back);
        for (int i = 0; i < rows; i++) error[at + i] = original[at + i] - scale[i] * value[i];
        for (int t = j + 1; t < columns; t++) {
            const float part = feedback[(size_t)j * columns + t];
            float *later = target + (size_t)t * rows;
            for (int i = 0; i < rows; i++) later[i] += part * error[at + i];
        }
    }
    free(x);
    free(back);
    return 0;
}
