/* Decode rows of a matrix to floats: for products with the BLAS (long prompts), and for embeddings. */
#include "kernels.h"
#include "spqr.h"

enum { PART = 16, RUN = 256 }; /* rows of a part; columns taken together, in loops that vectorise */

static void clear(float *rows, int count, size_t columns) { memset(rows, 0, sizeof *rows * (size_t)count * columns); }

static float scale_of(const struct bstack_matrix *matrix, int level, int row) {
    const size_t codes = (size_t)(matrix->rows + earlier_rows(matrix->kind[level])) * quarter_of(matrix->columns);
    return half_to_float(matrix->block[level] + codes + 2 * (size_t)row);
}

/* Add a row of a trellis or trellis5 block to `out`, or to zeros: a_i T[w_ij], for the rotated inputs. Returns the number of
 * blocks added: more where trellis5 blocks follow each other. */
static int add_trellis(const struct bstack_matrix *matrix, int level, int row, int zeros, float *out) {
    const int n = matrix->columns, kind = matrix->kind[level];
    const size_t q = quarter_of(n);
    const uint8_t *codes = matrix->block[level] + (size_t)row * q;
    const float a = scale_of(matrix, level, row);
    const struct kernels *kernels = bstack_kernels();
    if (kind == BSTACK_TRELLIS5 && kernels->decode5) {
        const uint8_t *block[STACKED];
        float scale[STACKED];
        int blocks = 0;
        for (; blocks < STACKED && level + blocks < matrix->count && matrix->kind[level + blocks] == kind; blocks++) {
            block[blocks] = matrix->block[level + blocks] + (size_t)row * q;
            scale[blocks] = scale_of(matrix, level + blocks, row);
        }
        kernels->decode5(block, scale, blocks, n, zeros, out);
        return blocks;
    }
    if (zeros) clear(out, 1, (size_t)n);
    if (kind == BSTACK_TRELLIS && kernels->decode) {
        kernels->decode(codes, n, a, out);
        return 1;
    }
    const uint8_t *table = kind == BSTACK_TRELLIS ? bstack_table : bstack_table5;
    float value[256];
    for (int w = 0; w < (kind == BSTACK_TRELLIS ? 256 : 64); w++) value[w] = a * (float)(table[w] - OFFSET);
    for (int quarter = 0; quarter < QUARTERS; quarter++) {
        const int shift = 2 * quarter, from = quarter * (int)q, length = n - from < (int)q ? n - from : (int)q;
        for (int start = 0; start < length; start += RUN) {
            const int run = length - start < RUN ? length - start : RUN;
            const uint8_t *at = codes + start;
            uint8_t window[RUN];
            for (int b = 0; b < run; b++)
                if (kind == BSTACK_TRELLIS)
                    window[b] = (uint8_t)((at[b + 3 * q] >> shift & 3) | (at[b + 2 * q] >> shift & 3) << 2 |
                                          (at[b + q] >> shift & 3) << 4 | (at[b] >> shift & 3) << 6);
                else
                    window[b] = (uint8_t)((at[b + 3 * q] >> shift & 3) | (at[b + q] >> shift & 3) << 4 |
                                          ((at[b + 4 * q] ^ at[b + 2 * q] ^ at[b]) >> shift & 3) << 2);
            for (int b = 0; b < run; b++) out[from + start + b] += value[window[b]];
        }
    }
    return 1;
}

/* Add the row of one sign block: S_ij (U V^T)_ij. */
static void add_sign(const struct bstack_matrix *matrix, int level, int row, float *out) {
    const int n = matrix->columns, rank = matrix->rank[level];
    const size_t stride = sign_stride(n), rows = (size_t)matrix->rows;
    const uint8_t *bits = matrix->block[level] + (size_t)row * stride;
    const uint8_t *u = matrix->block[level] + rows * stride + 2 * (size_t)row * (size_t)rank;
    const uint8_t *v = matrix->block[level] + rows * (stride + 2 * (size_t)rank);
    float left[BSTACK_RANK];
    for (int r = 0; r < rank; r++) left[r] = half_to_float(u + 2 * r);
    for (int start = 0; start < n; start += RUN) {
        const int run = n - start < RUN ? n - start : RUN;
        float right[RUN * BSTACK_RANK], sum[RUN];
        for (int k = 0; k < run * rank; k++) right[k] = half_to_float(v + 2 * ((size_t)start * (size_t)rank + (size_t)k));
        for (int j = 0; j < run; j++) {
            sum[j] = 0.0f;
            for (int r = 0; r < rank; r++) sum[j] += left[r] * right[j * rank + r];
        }
        for (int j = 0; j < run; j++) { /* without branches, since random signs cannot be predicted */
            uint32_t flipped;
            memcpy(&flipped, sum + j, 4);
            flipped ^= (~(uint32_t)bits[(start + j) >> 3] >> (j & 7) & 1u) << 31;
            memcpy(sum + j, &flipped, 4);
            out[start + j] += sum[j];
        }
    }
}

static const unsigned ROTATED = 1u << BSTACK_TRELLIS | 1u << BSTACK_TRELLIS5;

/* Add some rows of the blocks of some kinds to `out`, or to zeros: row by row, for the cache, unless an SpQR block has its rows
 * in tiles. */
static void add_kinds(const struct bstack_matrix *matrix, unsigned kinds, int row, int rows, int zeros, float *out) {
    const size_t n = (size_t)matrix->columns;
    int step = 1;
    for (int level = 0; level < matrix->count; level++)
        if (matrix->kind[level] == BSTACK_SPQR && kinds >> BSTACK_SPQR & 1) step = rows;
    for (int done = 0; done < rows; done += step) {
        float *to = out + (size_t)done * n;
        int fresh = zeros; /* these rows hold nothing yet */
        for (int level = 0, blocks; level < matrix->count; level += blocks) {
            const int kind = matrix->kind[level];
            blocks = 1;
            if (!(kinds >> kind & 1)) continue;
            if (fresh && !earlier_rows(kind)) clear(to, step, n);
            if (kind == BSTACK_SPQR) bstack_dense_add_rows(matrix, level, row, rows, to);
            for (int i = 0; i < step; i++)
                if (earlier_rows(kind))
                    blocks = add_trellis(matrix, level, row + done + i, fresh, to + (size_t)i * n);
                else if (kind == BSTACK_SIGN)
                    add_sign(matrix, level, row + done + i, to + (size_t)i * n);
                else if (kind == BSTACK_OUTLIERS)
                    bstack_outliers_add_row(matrix, level, row + done + i, to + (size_t)i * n);
            fresh = 0;
        }
        if (fresh) clear(to, step, n);
    }
}

struct job {
    const struct bstack_matrix *matrix;
    const int64_t *index;
    unsigned kinds;
    int start, count;
    float *out;
};

static void decode_part(void *argument, int part) {
    const struct job *job = argument;
    const size_t n = (size_t)job->matrix->columns;
    const int first = part * PART, count = job->count - first < PART ? job->count - first : PART;
    add_kinds(job->matrix, job->kinds, job->start + first, count, 1, job->out + (size_t)first * n);
}

void bstack_decode_rows(const struct bstack_matrix *matrix, unsigned kinds, int start, int stop, float *out) {
    struct bstack_matrix taken;
    bstack_copy_matrix(&taken, matrix);
    struct job job = {.matrix = &taken, .kinds = kinds, .start = start, .count = stop - start, .out = out};
    bstack_parallel(decode_part, &job, (job.count + PART - 1) / PART);
}

static void look_up_part(void *argument, int part) {
    const struct job *job = argument;
    const int n = job->matrix->columns;
    for (int k = part * PART; k < job->count && k < (part + 1) * PART; k++) {
        float *out = job->out + (size_t)k * (size_t)n;
        const int row = (int)job->index[k];
        add_kinds(job->matrix, ROTATED, row, 1, 1, out);
        bstack_unrotate(out, 1, n);
        add_kinds(job->matrix, ~ROTATED, row, 1, 0, out);
    }
}

void bstack_lookup(const struct bstack_matrix *matrix, const int64_t *index, int count, float *out) {
    struct bstack_matrix taken;
    bstack_copy_matrix(&taken, matrix);
    struct job job = {.matrix = &taken, .index = index, .count = count, .out = out};
    bstack_parallel(look_up_part, &job, (count + PART - 1) / PART);
}
