/* Products with matrices of floats, for many tokens: of decoded rows, and of the keys and values of attention.
 *
 * A BLAS is as fast, but its threads wait for each other at every product, which takes ten times as long where other programs
 * use the processor, and its results depend on the number of tokens. Here a token's result does not depend on the others;
 * instruction sets differ by the rounding of fused multiplications.
 */
#include "kernels.h"

#include <stdlib.h>

#ifdef BSTACK_X86
#include <immintrin.h>
#endif

enum {
    LANES = 16,
    ROWS = 4, TOKENS = 6, /* of a tile, whose sums stay in registers */
    MOST_ROWS = 32,       /* rows that are decoded together, fewer where they are long */
    FLOATS = 1 << 16,     /* of these rows: what the second-level cache holds */
    SHARE = 4,            /* parts for each thread */
    ALIGNMENT = 64,
};

/* sums[t * ROWS + r] = x_t w_r: rows of both are `n` floats apart, a multiple of LANES, all of which count. */
typedef void tile_function(const float *w, const float *x, size_t n, float *sums);

static void tile_portable(const float *w, const float *x, size_t n, float *sums) {
    for (int t = 0; t < TOKENS; t++)
        for (int r = 0; r < ROWS; r++) {
            const float *a = x + (size_t)t * n, *b = w + (size_t)r * n;
            float lane[LANES] = {0};
            for (size_t j = 0; j < n; j += LANES)
                for (int l = 0; l < LANES; l++) lane[l] += a[j + (size_t)l] * b[j + (size_t)l];
            for (int half = LANES / 2; half; half /= 2)
                for (int l = 0; l < half; l++) lane[l] += lane[l + half];
            sums[t * ROWS + r] = lane[0];
        }
}

#ifdef BSTACK_X86
#define UNROLLED _Pragma("GCC unroll 8")

/* Sums of the lanes of four registers. */
__attribute__((target("avx2,fma"), always_inline)) static inline __m128 sum_lanes(__m256 a, __m256 b, __m256 c, __m256 d) {
    const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}

__attribute__((target("avx2,fma"))) static void tile_avx2(const float *w, const float *x, size_t n, float *sums) {
    for (int first = 0; first < TOKENS; first += TOKENS / 2) {
        __m256 sum[TOKENS / 2][ROWS];
        UNROLLED for (int t = 0; t < TOKENS / 2; t++)
            UNROLLED for (int r = 0; r < ROWS; r++) sum[t][r] = _mm256_setzero_ps();
        for (size_t j = 0; j < n; j += 8) {
            __m256 row[ROWS];
            UNROLLED for (int r = 0; r < ROWS; r++) row[r] = _mm256_loadu_ps(w + (size_t)r * n + j);
            UNROLLED for (int t = 0; t < TOKENS / 2; t++) {
                const __m256 token = _mm256_loadu_ps(x + (size_t)(first + t) * n + j);
                UNROLLED for (int r = 0; r < ROWS; r++) sum[t][r] = _mm256_fmadd_ps(token, row[r], sum[t][r]);
            }
        }
        UNROLLED for (int t = 0; t < TOKENS / 2; t++)
            _mm_storeu_ps(sums + (first + t) * ROWS, sum_lanes(sum[t][0], sum[t][1], sum[t][2], sum[t][3]));
    }
}

__attribute__((target("avx512f,avx2,fma"), always_inline)) static inline __m256 halved(__m512 a) {
    return _mm256_add_ps(_mm512_castps512_ps256(a), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a), 1)));
}

__attribute__((target("avx512f,avx2,fma"))) static void tile_avx512(const float *w, const float *x, size_t n, float *sums) {
    __m512 sum[TOKENS][ROWS];
    UNROLLED for (int t = 0; t < TOKENS; t++)
        UNROLLED for (int r = 0; r < ROWS; r++) sum[t][r] = _mm512_setzero_ps();
    for (size_t j = 0; j < n; j += LANES) {
        __m512 row[ROWS];
        UNROLLED for (int r = 0; r < ROWS; r++) row[r] = _mm512_loadu_ps(w + (size_t)r * n + j);
        UNROLLED for (int t = 0; t < TOKENS; t++) {
            const __m512 token = _mm512_loadu_ps(x + (size_t)t * n + j);
            UNROLLED for (int r = 0; r < ROWS; r++) sum[t][r] = _mm512_fmadd_ps(token, row[r], sum[t][r]);
        }
    }
    UNROLLED for (int t = 0; t < TOKENS; t++)
        _mm_storeu_ps(sums + t * ROWS, sum_lanes(halved(sum[t][0]), halved(sum[t][1]), halved(sum[t][2]), halved(sum[t][3])));
}
#endif

static tile_function *tile_of_cpu(void) {
#ifdef BSTACK_X86
    if (bstack_kernels()->floats == 16) return tile_avx512;
    if (bstack_kernels()->floats == 8 && __builtin_cpu_supports("fma")) return tile_avx2;
#endif
    return tile_portable;
}

struct job {
    const struct bstack_matrix *matrix; /* or null: then rows are at w */
    unsigned kinds;
    const float *w, *x; /* x: `tokens` rows of `width` floats, whole tiles, zeros after the last column */
    size_t w_step, width, y_step;
    int rows, columns, tokens, block, parts, add;
    float *buffer, *y;
    tile_function *tile;
};

static void fill(const struct job *job, int start, int rows, float *to) {
    const size_t n = (size_t)job->columns;
    if (job->matrix) { /* decoded without gaps, then moved apart from the last on */
        bstack_decode_rows(job->matrix, job->kinds, start, start + rows, to);
        for (size_t r = (size_t)rows; job->width > n && r-- > 0;) memmove(to + r * job->width, to + r * n, sizeof *to * n);
    } else {
        for (size_t r = 0; r < (size_t)rows; r++)
            memcpy(to + r * job->width, job->w + ((size_t)start + r) * job->w_step, sizeof *to * n);
    }
    for (size_t r = 0; r < (size_t)rows; r++) memset(to + r * job->width + n, 0, sizeof *to * (job->width - n));
    memset(to + (size_t)rows * job->width, 0, sizeof *to * (size_t)(job->block - rows) * job->width);
}

INLINE void put(const struct job *job, const float *sums, int rows, float *y) {
    if (rows >= ROWS && !job->add)
        memcpy(y, sums, sizeof *y * ROWS);
    else
        for (int i = 0; i < ROWS && i < rows; i++) y[i] = job->add ? y[i] + sums[i] : sums[i];
}

static void multiply_part(void *argument, int part) {
    const struct job *job = argument;
    float *own = job->buffer + (size_t)part * (size_t)job->block * job->width;
    for (int start = part * job->block; start < job->rows; start += job->parts * job->block) {
        const int rows = job->rows - start < job->block ? job->rows - start : job->block;
        fill(job, start, rows, own);
        for (int t = 0; t < job->tokens; t += TOKENS)
            for (int r = 0; r < rows; r += ROWS) {
                float sums[TOKENS * ROWS];
                job->tile(own + (size_t)r * job->width, job->x + (size_t)t * job->width, job->width, sums);
                for (int k = 0; k < TOKENS && t + k < job->tokens; k++)
                    put(job, sums + k * ROWS, rows - r, job->y + (size_t)(t + k) * job->y_step + start + r);
            }
    }
}

static int run(struct job *job, const float *x, size_t x_step) {
    if (job->rows < 1 || job->tokens < 1) return 0;
    const size_t n = (size_t)job->columns, tokens = round_up((size_t)job->tokens, TOKENS);
    job->width = round_up(n, LANES);
    job->block = FLOATS / (int)job->width / ROWS * ROWS;
    job->block = job->block < ROWS ? ROWS : job->block > MOST_ROWS ? MOST_ROWS : job->block;
    const int blocks = (job->rows + job->block - 1) / job->block, parts = SHARE * bstack_threads();
    job->parts = blocks < parts ? blocks : parts;
    job->tile = tile_of_cpu();
    void *const whole = malloc(sizeof(float) * (tokens + (size_t)(job->parts * job->block)) * job->width + ALIGNMENT);
    if (!whole) return 1;
    float *memory = (float *)round_up((uintptr_t)whole, ALIGNMENT);
    job->buffer = memory + tokens * job->width;
    for (size_t t = 0; t < tokens; t++) {
        float *to = memory + t * job->width;
        const size_t count = t < (size_t)job->tokens ? n : 0;
        memcpy(to, x + (count ? t : 0) * x_step, sizeof *to * count);
        memset(to + count, 0, sizeof *to * (job->width - count));
    }
    job->x = memory;
    bstack_parallel(multiply_part, job, job->parts);
    free(whole);
    return 0;
}

int bstack_multiply_decoded(const struct bstack_matrix *matrix, unsigned kinds, const float *x, int tokens, float *y, size_t y_step,
                            int add) {
    struct bstack_matrix taken;
    bstack_copy_matrix(&taken, matrix);
    struct job job = {.matrix = &taken, .kinds = kinds, .rows = taken.rows, .columns = taken.columns, .tokens = tokens, .add = add,
                      .y = y, .y_step = y_step};
    return run(&job, x, (size_t)taken.columns);
}

int bstack_multiply_dense(const float *w, size_t w_step, int rows, int columns, const float *x, size_t x_step, int tokens, float *y,
                          size_t y_step) {
    struct job job = {.w = w, .w_step = w_step, .rows = rows, .columns = columns, .tokens = tokens, .y = y, .y_step = y_step};
    return run(&job, x, x_step);
}
