/* y = W x for few tokens: prepare the inputs once, then share out the rows of all matrices.
 *
 * One operand is a row of inputs as 16-bit codes with one scale: the rotated inputs of a token for all trellis blocks,
 * and the inputs times a column of V for each rank of a sign block. Codes have 16 bits, not 8, because the look-up of a weight
 * costs more than the product with it (14 for sign blocks, so that a sum of four fits 16). One scale for a whole row keeps
 * each sum an exact integer.
 */
#include "spqr.h"

#include <stdlib.h>

enum {
    ROWS = 32,           /* rows summed at once */
    TOKENS = SPQR_TOKENS,
    TILED = 3,           /* tokens from which on tiles are faster */
    PART = 1 << 13,      /* packed bytes of a part, at least */
    SHARE = 8,           /* parts for each thread, at least, where there is enough for it */
    PREPARED = 1 << 23,  /* bytes of operands, beyond which fewer tokens are taken at once */
};

/* The operands of one block (or of all trellis blocks): their codes, `step` bytes apart. */
struct operands {
    uint8_t *codes;
    size_t step;
    float *scale;   /* of each operand: token by token, ranks within */
    int64_t *total; /* sum of the codes of each */
    uint8_t *tiles; /* the same for kernels that take several operands in tiles; else null */
    int count;
};

struct job {
    const struct kernels *kernels;
    const struct bstack_matrix *matrices; /* as they were when the call began */
    const float *x;
    float *const *y;
    int count, tokens, columns;
    int steps;        /* parts of the preparation of a token */
    float *work;      /* tokens x steps x columns */
    int16_t *scratch; /* the same, columns filled up to whole groups */
    struct operands trellis;
    struct operands (*sign)[BSTACK_BLOCKS]; /* of each matrix and block */
    struct spqr_job spqr;
    int *first, *rows; /* of each matrix: its first part, and the rows of a part; first[count] is the number of parts */
};

/* Return the number of groups of an operand; zeros fill up the last one. */
static size_t groups_of(int columns, int kind) {
    const size_t each = earlier_rows(kind) ? quarter_of(columns) : (size_t)columns;
    return round_up(each, GROUP) / GROUP * (earlier_rows(kind) ? QUARTERS : 1);
}

/* Put the quantised x into place as operand number k; trellis operands by quarters, in turn for each 64 code bytes. */
static void store_operand(const struct job *job, struct operands *operands, int k, const float *x, int kind, int16_t *scratch) {
    const int n = job->columns;
    const size_t groups = groups_of(n, kind);
    int16_t *codes = (int16_t *)(operands->codes + (size_t)k * operands->step);
    int16_t *plain = kind == BSTACK_TRELLIS ? scratch : codes;
    operands->scale[k] = bstack_quantise(x, n, kind == BSTACK_TRELLIS ? X_LIMIT : SIGN_LIMIT, plain);
    int64_t total = 0;
    for (int j = 0; j < n; j++) total += plain[j];
    operands->total[k] = total;
    if (kind == BSTACK_TRELLIS) {
        const int q = (int)quarter_of(n);
        memset(codes, 0, operands->step);
        for (int quarter = 0; quarter < QUARTERS; quarter++)
            for (int b = 0; b < q; b += GROUP) {
                const int from = quarter * q + b;
                int length = q - b < GROUP ? q - b : GROUP;
                if (from + length > n) length = n - from;
                if (length > 0) memcpy(codes + QUARTERS * b + quarter * GROUP, plain + from, 2 * (size_t)length);
            }
    } else {
        memset(plain + n, 0, 2 * (groups * GROUP - (size_t)n));
    }
    job->kernels->arrange(codes, groups);
    if (operands->tiles) job->kernels->place((const uint8_t *)codes, groups, k, operands->count, operands->tiles);
}

/* Prepare a token: part 0 for all SpQR blocks and all trellis blocks, part 1 + i for the sign blocks of matrix i, if any. */
EACH_CPU static void prepare_part(void *argument, int part) {
    struct job *job = argument;
    const int n = job->columns, token = part / job->steps, i = part % job->steps - 1;
    const float *x = job->x + (size_t)token * (size_t)n;
    float *work = job->work + (size_t)part * (size_t)n;
    int16_t *scratch = job->scratch + (size_t)part * round_up((size_t)n, GROUP);
    if (i < 0) {
        bstack_spqr_prepare(&job->spqr, token, x);
        if (!job->trellis.count) return;
        memcpy(work, x, sizeof *x * (size_t)n);
        bstack_rotate(work, 1, n);
        store_operand(job, &job->trellis, token, work, BSTACK_TRELLIS, scratch);
        return;
    }
    const struct bstack_matrix *matrix = job->matrices + i;
    for (int level = 0; level < matrix->count; level++) {
        if (matrix->kind[level] != BSTACK_SIGN) continue;
        const int rank = matrix->rank[level];
        const uint8_t *v = matrix->block[level] + (size_t)matrix->rows * (sign_stride(n) + 2 * (size_t)rank);
        for (int r = 0; r < rank; r++) {
            for (int j = 0; j < n; j++) work[j] = x[j] * half_to_float(v + 2 * ((size_t)j * (size_t)rank + (size_t)r));
            store_operand(job, &job->sign[i][level], token * rank + r, work, BSTACK_SIGN, scratch);
        }
    }
}

/* Convert an integer below 2^51 in magnitude, rounding once, by operations that have vectors before AVX-512DQ: added to the bits
 * of 1.5 * 2^52 it is that double's last digits. */
INLINE float float_of(int64_t x) {
    x += 0x4338000000000000;
    double shifted;
    memcpy(&shifted, &x, 8);
    return (float)(shifted - 0x1.8p52);
}

EACH_CPU static void add_trellis(const struct job *job, const struct bstack_matrix *matrix, int level, int start, int rows,
                        float *restrict y, int64_t *restrict sums) {
    const size_t q = quarter_of(matrix->columns);
    const struct operands *in = &job->trellis;
    const struct kernels *kernels = job->kernels;
    const int kind = matrix->kind[level];
    const uint8_t *scale = matrix->block[level] + (size_t)(matrix->rows + earlier_rows(kind)) * q + 2 * (size_t)start;
    __builtin_prefetch(scale); /* far from the codes, and needed after them */
    __builtin_prefetch(scale + 2 * rows - 1);
    memset(sums, 0, sizeof *sums * (size_t)(rows * in->count));
    const int tiled = in->tiles && kind == BSTACK_TRELLIS5;
    const size_t segment = in->count > 4 && !tiled ? NARROW : SEGMENT, whole = (size_t)kernels->whole;
    /* What a row is filled up with is the next row's, or scales, and meets operands that are 0. */
    const size_t width = 2 * (size_t)matrix->rows >= whole ? round_up(q, whole) : q;
    for (size_t b = 0; b < q; b += segment) {
        const uint8_t *codes = matrix->block[level] + (size_t)start * q + b;
        const int length = (int)(width - b < segment ? width - b : segment);
        if (tiled)
            kernels->trellis5_tiles(codes, q, length, rows, in->tiles + b / GROUP * QUARTERS * tile_bytes(in->count), in->count, sums);
        else
            (kind == BSTACK_TRELLIS ? kernels->trellis : kernels->trellis5)(codes, q, length, rows, in->codes + b * QUARTERS * 2,
                                                                           in->step, in->count, sums);
    }
    float a[ROWS];
    for (int i = 0; i < rows; i++) a[i] = half_to_float(scale + 2 * (size_t)i);
    for (int t = 0; t < job->tokens; t++) {
        float *to = y + (size_t)t * matrix->rows + start;
        const int64_t offset = OFFSET * in->total[t], *sum = sums + t * rows;
        const float factor = in->scale[t];
        for (int i = 0; i < rows; i++) to[i] += float_of(sum[i] - offset) * factor * a[i];
    }
}

EACH_CPU static void add_sign(const struct job *job, const struct bstack_matrix *matrix, int level, const struct operands *in,
                     int start, int rows, float *y, int64_t *sums) {
    const size_t stride = sign_stride(matrix->columns);
    const int rank = matrix->rank[level];
    memset(sums, 0, sizeof *sums * (size_t)(rows * in->count));
    for (size_t b = 0; b < stride; b += SEGMENT)
        job->kernels->sign(matrix->block[level] + (size_t)start * stride + b, stride,
                           (int)(stride - b < SEGMENT ? stride - b : SEGMENT), rows, in->codes + b / 8 * OPERAND,
                           in->step, in->count, sums);
    const uint8_t *packed = matrix->block[level] + (size_t)matrix->rows * stride + 2 * (size_t)start * rank;
    float u[ROWS * BSTACK_RANK], total[ROWS];
    for (int k = 0; k < rows * rank; k++) u[k] = half_to_float(packed + 2 * (size_t)k);
    for (int t = 0; t < job->tokens; t++) {
        memset(total, 0, sizeof total);
        for (int r = 0; r < rank; r++) {
            const int k = t * rank + r;
            const int64_t *sum = sums + k * rows;
            for (int i = 0; i < rows; i++) total[i] += float_of(2 * sum[i] - in->total[k]) * in->scale[k] * u[i * rank + r];
        }
        float *to = y + (size_t)t * matrix->rows + start;
        for (int i = 0; i < rows; i++) to[i] += total[i];
    }
}

/* Multiply one part: some rows of one matrix, with all its blocks. */
static void multiply_rows(void *argument, int part) {
    const struct job *job = argument;
    int which = 0;
    while (part >= job->first[which + 1]) which++;
    const struct bstack_matrix *matrix = job->matrices + which;
    const int start = (part - job->first[which]) * job->rows[which];
    const int stop = start + job->rows[which] < matrix->rows ? start + job->rows[which] : matrix->rows;
    float *y = job->y[which];
    int64_t sums[ROWS * TOKENS * BSTACK_RANK];
    bstack_spqr_multiply(&job->spqr, which, start, stop - start, y);
    if (job->trellis.tiles) job->kernels->begin(job->trellis.count);
    for (int i = start; i < stop; i += ROWS) {
        const int rows = stop - i < ROWS ? stop - i : ROWS;
        for (int level = 0; level < matrix->count; level++)
            if (earlier_rows(matrix->kind[level]))
                add_trellis(job, matrix, level, i, rows, y, sums);
            else if (matrix->kind[level] == BSTACK_SIGN)
                add_sign(job, matrix, level, &job->sign[which][level], i, rows, y, sums);
    }
    if (job->trellis.tiles) job->kernels->end();
}

/* Lay out the arrays of the job in one piece of memory; with a null `memory`, only find its size. */
static size_t lay_out(struct job *job, uint8_t *memory) {
    size_t at = 0;
#define TAKE(pointer, bytes) ((pointer) = (void *)(memory ? memory + at : NULL), at += round_up((bytes), GROUP))
    const size_t t = (size_t)job->tokens, n = (size_t)job->columns, count = (size_t)job->count;
    job->steps = 1;
    for (size_t i = 0; i < count; i++)
        if (memchr(job->matrices[i].kind, BSTACK_SIGN, (size_t)job->matrices[i].count)) job->steps = 1 + job->count;
    TAKE(job->work, sizeof(float) * t * (size_t)job->steps * n);
    TAKE(job->scratch, sizeof(int16_t) * t * (size_t)job->steps * round_up(n, GROUP));
    TAKE(job->first, sizeof(int) * (count + 1));
    TAKE(job->rows, sizeof(int) * count);
    TAKE(job->sign, sizeof(*job->sign) * count);
    int trellis = 0;
    for (size_t i = 0; i < count; i++)
        for (int level = 0; level < job->matrices[i].count; level++) {
            const int kind = job->matrices[i].kind[level];
            struct operands found = {.step = groups_of(job->columns, kind), .count = job->tokens};
            found.step *= OPERAND;
            if (earlier_rows(kind)) {
                if (trellis++) continue; /* one for all */
            } else if (kind != BSTACK_SIGN) {
                continue;
            } else {
                found.count *= job->matrices[i].rank[level];
            }
            TAKE(found.codes, found.step * (size_t)found.count);
            TAKE(found.scale, sizeof(float) * (size_t)found.count);
            TAKE(found.total, sizeof(int64_t) * (size_t)found.count);
            if (earlier_rows(kind) && job->kernels->place && job->tokens >= TILED)
                TAKE(found.tiles, found.step / OPERAND * tile_bytes(found.count));
            if (earlier_rows(kind))
                job->trellis = found;
            else if (memory)
                job->sign[i][level] = found;
        }
#undef TAKE
    job->spqr.matrices = job->matrices;
    job->spqr.count = job->count;
    job->spqr.tokens = job->tokens;
    job->spqr.columns = job->columns;
    return bstack_spqr_lay_out(&job->spqr, memory, at);
}

/* Return the packed bytes of a row, plus 1 so that they can divide. */
static size_t row_bytes(const struct bstack_matrix *matrix) {
    size_t bytes = 1;
    for (int level = 0; level < matrix->count; level++)
        bytes += earlier_rows(matrix->kind[level])     ? quarter_of(matrix->columns)
                 : matrix->kind[level] == BSTACK_SIGN ? sign_stride(matrix->columns)
                                                      : bstack_spqr_row_bytes(matrix, level);
    return bytes;
}

/* Share out the rows of all matrices, in whole steps of ROWS. Returns the number of parts. */
static int split_rows(struct job *job) {
    size_t all = 0;
    for (int i = 0; i < job->count; i++) all += row_bytes(job->matrices + i) * (size_t)job->matrices[i].rows;
    size_t size = all / (size_t)(SHARE * bstack_threads());
    if (size < PART) size = PART;
    int parts = 0;
    for (int i = 0; i < job->count; i++) {
        const struct bstack_matrix *matrix = job->matrices + i;
        const size_t rows = round_up(size / row_bytes(matrix) + 1, ROWS);
        job->rows[i] = rows < (size_t)matrix->rows ? (int)rows : matrix->rows;
        job->first[i] = parts;
        parts += (matrix->rows + job->rows[i] - 1) / job->rows[i];
    }
    return job->first[job->count] = parts;
}

int bstack_multiply(const struct bstack_matrix *const *matrices, int count, const float *x, int tokens, float *const *y) {
    if (count < 1 || tokens < 1) return 0;
    struct bstack_matrix *taken = malloc((sizeof *taken + sizeof(float *)) * (size_t)count);
    if (!taken) return 1;
    for (int i = 0; i < count; i++) bstack_copy_matrix(taken + i, matrices[i]);
    float **outputs = (float **)(taken + count);
    struct job job = {.kernels = bstack_kernels(), .matrices = taken, .count = count, .tokens = 1};
    job.columns = taken->columns;
    job.y = outputs;
    const size_t fit = PREPARED / lay_out(&job, NULL);
    const int max_tokens = fit < 1 ? 1 : fit < TOKENS ? (int)fit : TOKENS;
    job.tokens = tokens < max_tokens ? tokens : max_tokens;
    uint8_t *memory = malloc(lay_out(&job, NULL) + GROUP);
    for (int done = 0; memory && done < tokens; done += job.tokens) {
        job.tokens = tokens - done < max_tokens ? tokens - done : max_tokens;
        job.trellis.count = 0;
        lay_out(&job, (uint8_t *)round_up((uintptr_t)memory, GROUP));
        job.x = x + (size_t)done * (size_t)job.columns;
        for (int i = 0; i < count; i++) outputs[i] = y[i] + (size_t)done * (size_t)taken[i].rows;
        const int parts = split_rows(&job);
        bstack_parallel(prepare_part, &job, job.tokens * job.steps);
        bstack_parallel(multiply_rows, &job, parts);
    }
    const int problem = !memory;
    free(taken);
    free(memory);
    return problem;
}
