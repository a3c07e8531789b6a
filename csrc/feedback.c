/* The feedback of the encoder between groups of columns, in integers: exact, so that threads do not matter.
 *
 * What columns k before column j pass on to it is s_i sum_k v_ki M_kj in row i: v are table values, whole numbers of 8 bits, and M_kj
 * is rounded to a whole number of steps, 2^-23 of the largest in its column: three digits of 8 bits. The product of the factor with
 * a matrix is made in the same way, whose rows become three digits too; of nine products of digits the three smallest are left out.
 */
#include "feedback.h"

#include <stdlib.h>

enum {
    MOST = 0x7F7F7F, /* the largest number of three digits */
    BLOCKS = 8,      /* AT_ONCE rows, in a part */
    NEAR = 8,        /* pieces that the near cache holds */
    SUMMED = 256,    /* pieces after which sums could leave 32 bits */
};

static int count_of(int all, int unit) { return (all + unit - 1) / unit; }

/* Whether the instruction set in use has such products. */
int bstack_feedback_offers(void) { return bstack_kernels()->feedback != NULL; }

/* Bytes of a factor of so many columns in digits, and of one digit of a matrix; both at a multiple of 64. Sums of a factor: int64_t. */
size_t bstack_feedback_factor_bytes(int columns) {
    const size_t groups = (size_t)count_of(columns, TOGETHER);
    return groups * (groups - 1) / 2 * DIGITS * LEFT * TILE;
}
size_t bstack_feedback_bytes(int columns, int rows) {
    return (size_t)count_of(rows, AT_ONCE) * (size_t)count_of(columns, TOGETHER) * RIGHT * TILE;
}
size_t bstack_feedback_sums(int columns) {
    const int groups = count_of(columns, TOGETHER);
    return (size_t)groups * (size_t)count_of(groups, SUMMED) * DIGITS * TOGETHER;
}

EACH_CPU
static float largest(const float *restrict row, int count) {
    float most[TOGETHER] = {0};
    for (int start = 0; start < count; start += TOGETHER) {
        const int left = count - start < TOGETHER ? count - start : TOGETHER;
        for (int j = 0; j < left; j++) {
            const float size = __builtin_fabsf(row[start + j]);
            most[j] = size > most[j] ? size : most[j];
        }
    }
    for (int j = 1; j < TOGETHER; j++) most[0] = most[j] > most[0] ? most[j] : most[0];
    return most[0];
}

/* Round 64 numbers to whole ones, and cut those into digits, the highest first, `next` bytes apart. */
EACH_CPU
static void cut(const float *restrict row, double inverse, int8_t *restrict digit, size_t next) {
    int32_t number[TOGETHER];
    for (int j = 0; j < TOGETHER; j++) number[j] = (int32_t)((double)row[j] * inverse + 0x1.8p52 - 0x1.8p52);
    for (int d = DIGITS - 1; d >= 0; d--)
        for (int j = 0; j < TOGETHER; j++) {
            const int8_t low = (int8_t)number[j];
            digit[(size_t)d * next + (size_t)j] = low;
            number[j] = (number[j] - low) >> 8;
        }
}

EACH_CPU
static int32_t sum_of(const int8_t *restrict digits) {
    int32_t sum = 0;
    for (int j = 0; j < TOGETHER; j++) sum += digits[j];
    return sum;
}

struct cutting {
    const float *factor;
    int columns;
    int8_t *digits;
    double *unit;
    int64_t *sums;
};

static void cut_group(void *argument, int turned) {
    const struct cutting *all = argument;
    const int groups = count_of(all->columns, TOGETHER), group = groups - 1 - turned, first = group * TOGETHER; /* the longest first */
    const size_t step = (size_t)group * TILE, next = LEFT * step;
    int64_t *sums = all->sums + (size_t)group * (size_t)count_of(groups, SUMMED) * DIGITS * TOGETHER;
    int8_t *digits = all->digits + (size_t)group * (size_t)(group - 1) / 2 * DIGITS * LEFT * TILE;
    for (int j = 0; j < TOGETHER; j++) {
        int8_t *to = digits + (size_t)(j / TALL) * step + j % TALL * TOGETHER;
        if (first + j >= all->columns) {
            for (int tile = 0; tile < DIGITS * group; tile++) memset(to + (size_t)(tile / group) * next + (size_t)(tile % group) * TILE, 0, TOGETHER);
            continue;
        }
        const float *column = all->factor + (size_t)(first + j) * (size_t)all->columns;
        const float most = largest(column, first);
        all->unit[first + j] = (double)most / MOST;
        const double inverse = most > 0 ? 1 / all->unit[first + j] : 0;
        for (int p = 0; p < group; p++) {
            cut(column + (size_t)p * TOGETHER, inverse, to + (size_t)p * TILE, next);
            for (int d = 0; d < DIGITS; d++) sums[(p / SUMMED * DIGITS + d) * TOGETHER + j] += sum_of(to + (size_t)d * next + (size_t)p * TILE);
        }
    }
}

/* Cut a factor, columns x columns and upper triangular, each column in neighbouring numbers: of each group of 64 what stands above it.
 * unit: columns, what a step of each column is; sums, zeros at first: bstack_feedback_sums. */
void bstack_feedback_cut(const float *factor, int columns, int8_t *digits, double *unit, int64_t *sums) {
    struct cutting all = {factor, columns, digits, unit, sums};
    bstack_parallel(cut_group, &all, count_of(columns, TOGETHER));
}

/* Place the values of up to 64 of `all` columns from `first` on, a multiple of 64; codes: columns x (EARLIER5 + rows).
 * Returns 0, or 1 when there is no memory. */
int bstack_feedback_place(const uint8_t *codes, int columns, int rows, int first, int all, uint8_t *placed) {
    const size_t padded = (size_t)count_of(rows, TOGETHER) * TOGETHER;
    uint8_t *value = calloc(4, padded);
    if (!value) return 1;
    for (int four = 0; four < TOGETHER / 4; four++) {
        for (int k = 0; k < 4 && 4 * four + k < columns; k++)
            bstack_kernels()->feedback->look_up(codes + (size_t)(4 * four + k) * (size_t)(rows + EARLIER5), rows, value + (size_t)k * padded);
        for (int i = 0; i < rows; i += TALL) {
            uint8_t *to = placed + ((size_t)(i / AT_ONCE) * (size_t)count_of(all, TOGETHER) + (size_t)(first / TOGETHER)) * RIGHT * TILE +
                          i / TALL % RIGHT * TILE + four * 4 * TALL;
            const uint8_t *at = value + i;
            uint32_t both[TALL];
            for (int l = 0; l < TALL; l++)
                both[l] = at[l] | (uint32_t)at[padded + l] << 8 | (uint32_t)at[2 * padded + l] << 16 | (uint32_t)at[3 * padded + l] << 24;
            memcpy(to, both, sizeof both);
        }
    }
    free(value);
    return 0;
}

struct placing {
    const float *matrix;
    int columns, rows;
    uint8_t *placed;
    float *unit;
};

static void place_rows(void *argument, int block) {
    const struct placing *all = argument;
    const int pieces = count_of(all->columns, TOGETHER);
    const size_t next = bstack_feedback_bytes(all->columns, all->rows);
    for (int i = 0; i < AT_ONCE && block * AT_ONCE + i < all->rows; i++) {
        const float *row = all->matrix + (size_t)(block * AT_ONCE + i) * (size_t)all->columns;
        const float most = largest(row, all->columns);
        const double unit = (double)most / MOST, inverse = most > 0 ? 1 / unit : 0;
        all->unit[block * AT_ONCE + i] = (float)unit;
        uint8_t *to = all->placed + (size_t)block * (size_t)pieces * RIGHT * TILE + i / TALL * TILE + i % TALL * 4;
        for (int p = 0; p < all->columns / TOGETHER; p++, row += TOGETHER, to += RIGHT * TILE) { /* no column of the last piece passes anything on */
            int8_t digit[DIGITS][TOGETHER];
            cut(row, inverse, digit[0], sizeof digit[0]);
            for (int d = 0; d < DIGITS; d++)
                for (int k = 0; k < TOGETHER; k += 4) {
                    uint32_t four;
                    memcpy(&four, digit[d] + k, 4);
                    four ^= 0x80808080; /* 128 is added */
                    memcpy(to + (size_t)d * next + k * TALL, &four, 4);
                }
        }
    }
}

/* Place a matrix, rows x columns: three digits, bstack_feedback_bytes each. unit: rows, what a step of each row is. */
void bstack_feedback_place_rows(const float *matrix, int columns, int rows, uint8_t *placed, float *unit) {
    struct placing all = {matrix, columns, rows, placed, unit};
    bstack_parallel(place_rows, &all, count_of(rows, AT_ONCE));
}

struct pass {
    const int8_t *digits;
    const double *unit;
    const int64_t *sums;
    const uint8_t *placed;
    const float *scale;
    float *target;
    size_t next;
    int pieces, all, columns, rows, depth, failed;
};

EACH_CPU
static void add_scaled(float *restrict target, const float *restrict scale, const int32_t *restrict high, const int32_t *restrict middle,
                       const int32_t *restrict low, double offset, double unit, int rows) {
    for (int i = 0; i < rows; i++) {
        const double sum = ((double)high[i] * 65536 + (double)middle[i] * 256) + (double)low[i];
        target[i] += scale[i] * (float)((sum - offset) * unit);
    }
}

static void pass_rows(void *argument, int part) {
    struct pass *pass = argument;
    const int first = part * BLOCKS, left = count_of(pass->rows, AT_ONCE) - first, blocks = left < BLOCKS ? left : BLOCKS;
    const size_t bytes = sizeof(int32_t) * DIGITS * LEVEL * (size_t)blocks;
    int32_t *all = aligned_alloc(64, bytes);
    if (!all) {
        __atomic_store_n(&pass->failed, 1, __ATOMIC_RELAXED);
        return;
    }
    for (int start = 0; start < pass->pieces; start += SUMMED) {
        const int stop = pass->pieces - start < SUMMED ? pass->pieces : start + SUMMED;
        memset(all, 0, bytes);
        const size_t row = (size_t)pass->all * RIGHT * TILE;
        for (int p = start; p < stop; p += NEAR)
            for (int d = 0; d < pass->depth; d++) {
                const int8_t *left = pass->digits + (size_t)p * TILE;
                const uint8_t *at = pass->placed + (size_t)d * pass->next + (size_t)first * row + (size_t)p * RIGHT * TILE;
                for (int b = 0; b < blocks; b++, at += row)
                    bstack_kernels()->feedback->products(left, (size_t)pass->pieces, (DIGITS - d) * LEFT, left + NEAR * TILE + b * TILE / BLOCKS, at,
                                                         b + 1 < blocks ? at + row : at - (size_t)b * row + NEAR * RIGHT * TILE,
                                                         stop - p < NEAR ? stop - p : NEAR, all + (size_t)(b * DIGITS + d) * LEVEL);
            }
        for (int j = 0; j < pass->columns; j++) {
            const int64_t *sum = pass->sums + start / SUMMED * DIGITS * TOGETHER + j;
            int64_t offset = 0, digits = 0;
            for (int level = 0; level < DIGITS; level++) {
                digits = level < pass->depth ? digits + sum[level * TOGETHER] : digits + sum[level * TOGETHER] - sum[(level - pass->depth) * TOGETHER];
                offset = 256 * offset + OFFSET * digits;
            }
            for (int i = 0; i < blocks * AT_ONCE; i += TALL) {
                const int row = first * AT_ONCE + i, rest = pass->rows - row;
                const int32_t *at = all + (size_t)(i / AT_ONCE * DIGITS) * LEVEL + (j / TALL * RIGHT + i / TALL % RIGHT) * SUM + j % TALL * TALL;
                if (rest > 0)
                    add_scaled(pass->target + (size_t)j * (size_t)pass->rows + row, pass->scale + row, at, at + LEVEL, at + 2 * LEVEL,
                               (double)offset, pass->unit[j], rest < TALL ? rest : TALL);
            }
        }
    }
    free(all);
}

/* Add to the targets of the group of up to 64 columns after `before` columns, a multiple of 64, what they pass on, times each row's scale.
 *
 * digits, unit, sums: of the whole factor.    placed: values, `depth` 1, or a matrix, 3: `all` columns.    target: columns * rows.
 * Returns 0, or 1 when there is no memory.
 */
int bstack_feedback_pass(const int8_t *digits, const double *unit, const int64_t *sums, const uint8_t *placed, int depth, int before,
                         int columns, int all, int rows, const float *scale, float *target) {
    const int pieces = before / TOGETHER, groups = count_of(all, TOGETHER);
    struct pass pass = {
        .digits = digits + (size_t)pieces * (size_t)(pieces - 1) / 2 * DIGITS * LEFT * TILE,
        .unit = unit + before, .sums = sums + (size_t)pieces * (size_t)count_of(groups, SUMMED) * DIGITS * TOGETHER,
        .placed = placed, .scale = scale, .target = target, .next = bstack_feedback_bytes(all, rows), .pieces = pieces, .all = groups,
        .columns = columns, .rows = rows, .depth = depth,
    };
    if (pieces) bstack_parallel(pass_rows, &pass, count_of(rows, BLOCKS * AT_ONCE));
    return pass.failed;
}
