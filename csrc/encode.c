/* Encode trellis5 blocks: a Viterbi search down the rows of each column, with error feedback between columns.
 *
 * Code of row i: c0; of k rows above: ck. Value of row i = table[c1 + 4 (c0 ^ c2 ^ c4) + 16 c3]. A state is what the next row
 * sees, c0 + 4 c1 + 16 c2 + 64 c3: 256 of them, 4 codes lead out of each. The codes of four rows before the first are stored
 * too, so the search may start in any state.
 *
 * Every float operation is a plain IEEE single operation in a fixed order (built with -ffp-contract=off), so that the
 * reference in bstack/kernels/reference.py gives the same codes on every machine.
 */
#include "encode.h"

#include <stdlib.h>

/* Search one row: from the costs of the 256 states before it, the costs after it and the oldest code on the way to each.
 *
 * The window w follows the state w >> 2, its low bits are the new code. Windows that differ in their oldest code alone
 * lead to the same state, so the last loops compare four runs of 256 neighbours. (Compilers vectorise loops of 64 and more;
 * they unroll shorter ones first and then do not vectorise them.)
 */
INLINE void advance(float x, float weight, const float *restrict value, const float *restrict before, float *restrict after,
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
        const float d = x - value[w];
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

/* The table's place of a window. */
INLINE int place_of(int window) {
    return (window >> 2 & 3) + 4 * ((window ^ window >> 4 ^ window >> 8) & 3) + 16 * (window >> 6 & 3);
}

EACH_CPU
static int search(const float *restrict x, const float *restrict weight, int rows, const float *restrict table,
                  uint8_t *restrict back) {
    float value[WINDOWS], even[STATES], odd[STATES];
    float *before = even, *after = odd;
    for (int w = 0; w < WINDOWS; w++) value[w] = table[place_of(w)];
    for (int s = 0; s < STATES; s++) before[s] = 0.0f;
    for (int i = 0; i < rows; i++) {
        advance(x[i], weight[i], value, before, after, back + (size_t)i * STATES);
        if ((i & 15) == 15) { /* keep the sums small, so that single precision is fine enough */
            const float zero = after[0];
            for (int s = 0; s < STATES; s++) after[s] -= zero;
        }
        float *swap = before;
        before = after;
        after = swap;
    }
    return cheapest(before);
}

static int oldest(const uint8_t *back, int row, int state) { return back[(size_t)row * STATES + state]; }

const struct encoder bstack_encoder = {.search = search, .oldest = oldest};

/* Find the cheapest path through one column.
 *
 * x, weight: rows' targets (already divided by the row scales) and cost weights; back: rows * STATES bytes of scratch.
 * Writes EARLIER5 + rows codes and rows table values.
 */
static void search_column(const struct encoder *encoder, const float *x, const float *weight, int rows, const float *table,
                          uint8_t *code, float *value, uint8_t *back) {
    int state = encoder->search(x, weight, rows, table, back);
    for (int i = rows - 1; i >= 0; i--) {
        const int window = state + encoder->oldest(back, i, state) * STATES;
        code[EARLIER5 + i] = (uint8_t)(window & (CODES - 1));
        value[i] = table[place_of(window)];
        state = window >> 2;
    }
    for (int i = EARLIER5 - 1; i >= 0; i--, state >>= 2) code[i] = (uint8_t)(state & (CODES - 1));
}

EACH_CPU
static void feed_on(float *restrict later, const float *restrict error, float part, int rows) {
    for (int i = 0; i < rows; i++) later[i] += part * error[i];
}

/* Encode a group of columns, each stored contiguously.
 *
 * target:   columns * rows, what each column should become; changed by the feedback of the columns before it.
 * original: columns * rows, what the error is measured against.
 * feedback: columns * columns, [j][t] = part of column j's error that column t > j makes up for.
 * table: 64.    scale, weight: rows.    code: columns * (EARLIER5 + rows), error: columns * rows, both written.
 * Returns 0, or 1 when there is no memory.
 */
int bstack_trellis_encode(float *target, const float *original, int columns, int rows, const float *feedback,
                          const float *table, const float *scale, const float *weight, uint8_t *code, float *error) {
    const struct encoder *encoder = bstack_kernels()->encoder;
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
        search_column(encoder, x, weight, rows, table, code + at + (size_t)j * EARLIER5, value, back);
        for (int i = 0; i < rows; i++) error[at + i] = original[at + i] - scale[i] * value[i];
        for (int t = j + 1; t < columns; t++)
            feed_on(target + (size_t)t * rows, error + at, feedback[(size_t)j * columns + t], rows);
    }
    free(x);
    free(back);
    return 0;
}
