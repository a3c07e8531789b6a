/* Products with matrices of floats, for many tokens: of decoded rows, and of the keys and values of attention.
 *
 * A BLAS is as fast, but its threads wait for each other at every product, which takes ten times as long where other programs
 * use the processor, and its results depend on the number of tokens. Here a token's result does not depend on the others;
 * instruction sets differ by the rounding of fused multiplications.
 */
#include "kernels.h"

#include <stdatomic.h>
#include <stdlib.h>

#ifdef BSTACK_X86
#include <immintrin.h>
#endif

enum {
    PANEL = DENSE_PANEL, TOKENS = 12, /* of a tile, whose sums stay in registers */
    DEPTH = 512,                      /* columns that are summed before the sums are stored */
    LINES = 16,                       /* rows that are decoded together */
};

/* y[t * y_step + l] = sum of x[t * x_step + j] w[j * w_step + l] over j below n, in this order, for TOKENS t and PANEL l; with `add`
 * added to what is there. */
typedef void tile_function(const float *w, size_t w_step, const float *x, size_t x_step, int n, float *y, size_t y_step, int add);

EACH_CPU static void tile_portable(const float *w, size_t w_step, const float *x, size_t x_step, int n, float *y, size_t y_step,
                                   int add) {
    for (int t = 0; t < TOKENS; t++, x += x_step, y += y_step) {
        float sum[PANEL] = {0};
        for (int j = 0; j < n; j++)
            for (int l = 0; l < PANEL; l++) sum[l] += x[j] * w[(size_t)j * w_step + (size_t)l];
        for (int l = 0; l < PANEL; l++) y[l] = add ? y[l] + sum[l] : sum[l];
    }
}

#ifdef BSTACK_X86

/* Three rows from each pointer, so that all addresses fit the registers. */
__attribute__((target("avx2,fma"))) static void tile_avx2(const float *w, size_t w_step, const float *x, size_t x_step, int n,
                                                          float *y, size_t y_step, int add) {
    enum { SOME = 6, LANES = 8 };
    for (int first = 0; first < TOKENS; first += SOME)
        for (int lane = 0; lane < PANEL; lane += 2 * LANES) {
            const float *row[2] = {x + (size_t)first * x_step, x + ((size_t)first + 3) * x_step}, *at = w + lane;
            __m256 sum[SOME][2];
            UNROLL for (int t = 0; t < SOME; t++) sum[t][0] = sum[t][1] = _mm256_setzero_ps();
            for (int j = 0; j < n; j++, at += w_step, row[0]++, row[1]++) {
                const __m256 low = _mm256_loadu_ps(at), high = _mm256_loadu_ps(at + LANES);
                UNROLL for (int t = 0; t < SOME; t++) {
                    const __m256 token = _mm256_broadcast_ss(row[t / 3] + (size_t)(t % 3) * x_step);
                    sum[t][0] = _mm256_fmadd_ps(token, low, sum[t][0]);
                    sum[t][1] = _mm256_fmadd_ps(token, high, sum[t][1]);
                }
            }
            UNROLL for (int t = 0; t < SOME; t++)
                UNROLL for (int half = 0; half < 2; half++) {
                    float *to = y + (size_t)(first + t) * y_step + lane + half * LANES;
                    _mm256_storeu_ps(to, add ? _mm256_add_ps(_mm256_loadu_ps(to), sum[t][half]) : sum[t][half]);
                }
        }
}

__attribute__((target("avx512f"))) static void tile_avx512(const float *w, size_t w_step, const float *x, size_t x_step, int n,
                                                           float *y, size_t y_step, int add) {
    enum { LANES = 16 };
    const float *row[4] = {x, x + 3 * x_step, x + 6 * x_step, x + 9 * x_step};
    __m512 sum[TOKENS][2];
    UNROLL for (int t = 0; t < TOKENS; t++) sum[t][0] = sum[t][1] = _mm512_setzero_ps();
    for (int j = 0; j < n; j++, w += w_step) {
        const __m512 low = _mm512_loadu_ps(w), high = _mm512_loadu_ps(w + LANES);
        UNROLL for (int t = 0; t < TOKENS; t++) {
            const __m512 token = _mm512_set1_ps(row[t / 3][(size_t)(t % 3) * x_step]);
            sum[t][0] = _mm512_fmadd_ps(token, low, sum[t][0]);
            sum[t][1] = _mm512_fmadd_ps(token, high, sum[t][1]);
        }
        UNROLL for (int k = 0; k < 4; k++) row[k]++;
    }
    UNROLL for (int t = 0; t < TOKENS; t++)
        UNROLL for (int half = 0; half < 2; half++) {
            float *to = y + (size_t)t * y_step + half * LANES;
            _mm512_storeu_ps(to, add ? _mm512_add_ps(_mm512_loadu_ps(to), sum[t][half]) : sum[t][half]);
        }
}
#endif

static tile_function *tile_of_cpu(void) {
#ifdef BSTACK_X86
    if (bstack_kernels()->floats == 16) return tile_avx512;
    if (bstack_kernels()->floats == 8 && __builtin_cpu_supports("fma")) return tile_avx2;
#endif
    return tile_portable;
}

/* Run a tile of which only some tokens and columns are there, on a copy. */
static void multiply_edge(tile_function *tile, const float *w, size_t w_step, int columns, const float *x, size_t x_step, int tokens,
                          int n, float *y, size_t y_step, int add) {
    ALIGNED float given[TOKENS * DEPTH], sums[TOKENS * PANEL];
    for (int t = 0; t < TOKENS; t++) memcpy(given + t * DEPTH, x + (size_t)(t < tokens ? t : 0) * x_step, sizeof *x * (size_t)n);
    tile(w, w_step, given, DEPTH, n, sums, PANEL, 0);
    for (int t = 0; t < tokens; t++)
        for (int l = 0; l < columns; l++) {
            float *to = y + (size_t)t * y_step + l;
            *to = add ? *to + sums[t * PANEL + l] : sums[t * PANEL + l];
        }
}

void bstack_multiply_panels(const float *w, size_t w_step, int columns, const float *x, size_t x_step, int tokens, int n, float *y,
                            size_t y_step, int add) {
    tile_function *const tile = tile_of_cpu();
    for (int lane = 0; lane < columns; lane += PANEL)
        for (int j = 0; j < n; j += DEPTH)
            for (int t = 0; t < tokens; t += TOKENS) {
                const float *const panel = w + (size_t)j * w_step + lane, *const rows = x + (size_t)t * x_step + j;
                float *const to = y + (size_t)t * y_step + lane;
                const int depth = n - j < DEPTH ? n - j : DEPTH, sum = add || j;
                if (tokens - t >= TOKENS && columns - lane >= PANEL)
                    tile(panel, w_step, rows, x_step, depth, to, y_step, sum);
                else
                    multiply_edge(tile, panel, w_step, columns - lane < PANEL ? columns - lane : PANEL, rows, x_step,
                                  tokens - t < TOKENS ? tokens - t : TOKENS, depth, to, y_step, sum);
            }
}

struct job {
    const struct bstack_matrix *matrix; /* or null: then rows are at w */
    unsigned kinds;
    const float *w, *x;
    size_t w_step, x_step, y_step, room; /* room: floats of a part's buffer */
    int rows, columns, tokens, add;
    atomic_int next; /* the next panel to take */
    float *buffer, *y;
};

/* Put some rows side by side into columns `from` on of a panel: column j of the rows becomes a line of it. */
static void turn(float *panel, const float *rows, size_t step, int from, int count, int columns) {
    int r = 0;
#ifdef BSTACK_X86
    for (; r + 4 <= count; r += 4) {
        const float *at = rows + (size_t)r * step;
        float *to = panel + from + r;
        int j = 0;
        for (; j + 4 <= columns; j += 4, at += 4, to += 4 * PANEL) {
            __m128 a = _mm_loadu_ps(at), b = _mm_loadu_ps(at + step), c = _mm_loadu_ps(at + 2 * step), d = _mm_loadu_ps(at + 3 * step);
            _MM_TRANSPOSE4_PS(a, b, c, d);
            _mm_storeu_ps(to, a);
            _mm_storeu_ps(to + PANEL, b);
            _mm_storeu_ps(to + 2 * PANEL, c);
            _mm_storeu_ps(to + 3 * PANEL, d);
        }
        for (; j < columns; j++, at++, to += PANEL)
            for (size_t k = 0; k < 4; k++) to[k] = at[k * step];
    }
#endif
    for (; r < count; r++)
        for (int j = 0; j < columns; j++) panel[j * PANEL + from + r] = rows[(size_t)r * step + (size_t)j];
}

static void fill(const struct job *job, int start, int count, float *panel, float *lines) {
    if (count < PANEL) memset(panel, 0, sizeof *panel * PANEL * (size_t)job->columns);
    for (int r = 0; r < count; r += LINES) {
        const int some = count - r < LINES ? count - r : LINES;
        if (job->matrix) bstack_decode_rows(job->matrix, job->kinds, start + r, start + r + some, lines);
        const float *rows = job->matrix ? lines : job->w + (size_t)(start + r) * job->w_step;
        turn(panel, rows, job->matrix ? (size_t)job->columns : job->w_step, r, some, job->columns);
    }
}

static void multiply_part(void *argument, int part) {
    struct job *job = argument;
    float *panel = job->buffer + (size_t)part * job->room, *lines = panel + (size_t)job->columns * PANEL;
    for (int start; (start = PANEL * atomic_fetch_add(&job->next, 1)) < job->rows;) {
        const int count = job->rows - start < PANEL ? job->rows - start : PANEL;
        fill(job, start, count, panel, lines);
        bstack_multiply_panels(panel, PANEL, count, job->x, job->x_step, job->tokens, job->columns, job->y + start, job->y_step, job->add);
    }
}

static int run(struct job *job) {
    if (job->rows < 1 || job->tokens < 1) return 0;
    const int panels = (job->rows + PANEL - 1) / PANEL, threads = bstack_threads(), parts = panels < threads ? panels : threads;
    job->room = round_up((size_t)job->columns * (PANEL + LINES), GROUP);
    void *const whole = malloc(sizeof(float) * job->room * (size_t)parts + GROUP);
    if (!whole) return 1;
    job->buffer = (float *)round_up((uintptr_t)whole, GROUP);
    bstack_parallel(multiply_part, job, parts);
    free(whole);
    return 0;
}

int bstack_multiply_decoded(const struct bstack_matrix *matrix, unsigned kinds, const float *x, int tokens, float *y, size_t y_step,
                            int add) {
    struct bstack_matrix taken;
    bstack_copy_matrix(&taken, matrix);
    struct job job = {.matrix = &taken, .kinds = kinds, .rows = taken.rows, .columns = taken.columns, .x = x,
                      .x_step = (size_t)taken.columns, .tokens = tokens, .add = add, .y = y, .y_step = y_step};
    return run(&job);
}

int bstack_multiply_dense(const float *w, size_t w_step, int rows, int columns, const float *x, size_t x_step, int tokens, float *y,
                          size_t y_step) {
    struct job job = {.w = w, .w_step = w_step, .rows = rows, .columns = columns, .x = x, .x_step = x_step, .tokens = tokens, .y = y,
                      .y_step = y_step};
    return run(&job);
}
