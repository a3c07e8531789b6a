/* Decode rows of a matrix to floats: for products with the BLAS (long prompts), and for embeddings. */
#include "kernels.h"
#include "spqr.h"

enum { PART = 16, RUN = 256 }; /* rows of a part; columns taken together, in loops that vectorise */

/* Add the rows of one trellis block: a_i T[w_ij], for the rotated inputs. */
static void add_trellis(const struct bstack_matrix *matrix, int level, int row, float *out) {
    const int n = matrix->columns;
    const size_t q = quarter_of(n);
    const uint8_t *codes = matrix->block[level] + (size_t)row * q;
    const float a = half_to_float(matrix->block[level] + ((size_t)matrix->rows + EARLIER) * q + 2 * (size_t)row);
    if (bstack_kernels()->decode) {
        bstack_kernels()->decode(codes, n, a, out);
        return;
    }
    float value[256];
    for (int w = 0; w < 256; w++) value[w] = a * (float)(bstack_table[w] - OFFSET);
    for (int quarter = 0; quarter < QUARTERS; quarter++) {
        const int shift = 2 * quarter, from = quarter * (int)q, length = n - from < (int)q ? n - from : (int)q;
        for (int start = 0; start < length; start += RUN) {
            const int run = length - start < RUN ? length - start : RUN;
            const uint8_t *at = codes + start;
            uint8_t window[RUN];
            for (int b = 0; b < run; b++)
                window[b] = (uint8_t)((at[b + 3 * q] >> shift & 3) | (at[b + 2 * q] >> shift & 3) << 2 |
                                      (at[b + q] >> shift & 3) << 4 | (at[b] >> shift & 3) << 6);
            for (int b = 0; b < run; b++) out[from + start + b] += value[window[b]];
        }
    }
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

static const unsigned ROTATED = 1u << BSTACK_TRELLIS;

/* Add some rows of the blocks of some kinds: row by row, for the cache, unless an SpQR block has its rows in tiles. */
static void add_kinds(const struct bstack_matrix *matrix, unsigned kinds, int row, int rows, float *out) {
    int step = 1;
    for (int level = 0; level < matrix->count; level++)
        if (matrix->kind[level] == BSTACK_SPQR && kinds >> BSTACK_SPQR & 1) step = rows;
    for (int done = 0; done < rows; done += step)
        for (int level = 0; level < matrix->count; level++) {
            const int kind = matrix->kind[level];
            if (!(kinds >> kind & 1)) continue;
            for (int i = done; i < done + step; i++) {
                float *to = out + (size_t)i * (size_t)matrix->columns;
                if (kind == BSTACK_TRELLIS)
                    add_trellis(matrix, level, row + i, to);
                else if (kind == BSTACK_SIGN)
                    add_sign(matrix, level, row + i, to);
                else if (kind == BSTACK_OUTLIERS)
                    bstack_outliers_add_row(matrix, level, row + i, to);
                else if (i == done)
                    bstack_dense_add_rows(matrix, level, row, rows, to);
            }
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
    float *out = job->out + (size_t)first * n;
    memset(out, 0, sizeof *out * n * (size_t)count);
    add_kinds(job->matrix, job->kinds, job->start + first, count, out);
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
        memset(out, 0, sizeof *out * (size_t)n);
        add_kinds(job->matrix, ROTATED, row, 1, out);
        bstack_unrotate(out, 1, n);
        add_kinds(job->matrix, ~ROTATED, row, 1, out);
    }
}

void bstack_lookup(const struct bstack_matrix *matrix, const int64_t *index, int count, float *out) {
    struct bstack_matrix taken;
    bstack_copy_matrix(&taken, matrix);
    struct job job = {.matrix = &taken, .index = index, .count = count, .out = out};
    bstack_parallel(look_up_part, &job, (count + PART - 1) / PART);
}
