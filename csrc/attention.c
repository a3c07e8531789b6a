/* Attention over caches of keys and values in pages, of single or half precision. */
#include "decoder.h"

#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>

#ifdef BSTACK_X86
#include <immintrin.h>
#endif

enum {
    TOGETHER = 48, /* tokens in a row whose attention is computed together */
    BLOCK = 64,    /* keys that are taken together where the caches have no pages */
};

/* Half precision to single, as half_to_float does. */
INLINE float widened(uint16_t half) { return half_to_float((const uint8_t *)&half); }

/* Single precision to half, to nearest, ties to even; what is too large becomes the largest, NaN stays. */
INLINE uint16_t narrowed(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const uint16_t sign = (uint16_t)(bits >> 16 & 0x8000u);
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return sign | 0x7e00u;
    float size;
    memcpy(&size, &bits, 4);
    size = (size < 65504.0f ? size : 65504.0f) * 0x1p-112f; /* the exponent is half precision's now, for subnormal ones too */
    memcpy(&bits, &size, 4);
    return sign | (uint16_t)((bits + 0xfffu + (bits >> 13 & 1u)) >> 13);
}

EACH_CPU
static void widen_plain(float *restrict y, const uint16_t *restrict x, int n) {
    for (int j = 0; j < n; j++) y[j] = widened(x[j]);
}

#ifdef BSTACK_X86
__attribute__((target("avx512f"))) static void widen_avx512(float *y, const uint16_t *x, int n) {
    int j = 0;
    for (; j + 16 <= n; j += 16) _mm512_storeu_ps(y + j, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(x + j))));
    widen_plain(y + j, x + j, n - j);
}

__attribute__((target("avx,f16c"))) static void widen_avx(float *y, const uint16_t *x, int n) {
    int j = 0;
    for (; j + 8 <= n; j += 8) _mm256_storeu_ps(y + j, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(x + j))));
    widen_plain(y + j, x + j, n - j);
}
#endif

/* Half precision to single, exactly. */
static void widen(float *y, const uint16_t *x, int n) {
#ifdef BSTACK_X86
    if (bstack_kernels()->floats == 16) {
        widen_avx512(y, x, n);
        return;
    }
    if (bstack_kernels()->floats == 8 && __builtin_cpu_supports("f16c")) {
        widen_avx(y, x, n);
        return;
    }
#endif
    widen_plain(y, x, n);
}

/* Widen some rows of `n` numbers to rows that are `step` apart. */
static void widen_rows(float *y, size_t step, const uint16_t *x, int rows, int n) {
    if (step == (size_t)n) {
        widen(y, x, rows * n);
        return;
    }
    for (int i = 0; i < rows; i++) {
        widen(y + (size_t)i * step, x + i * n, n);
        memset(y + (size_t)i * step + n, 0, sizeof *y * (step - (size_t)n));
    }
}

void bstack_store(const struct pass *pass, const struct bstack_text *text, const float *key, const float *value) {
    const struct bstack_decoder *d = pass->decoder;
    const size_t page = (size_t)(pass->layer - d->layer) * (size_t)text->pages + (size_t)(text->position / d->page);
    const size_t n = (size_t)d->head_width, size = (size_t)d->page, at = (size_t)(text->position % d->page);
    for (size_t h = 0; h < (size_t)d->key_heads; h++, key += n, value += n) {
        if (!d->half) {
            memcpy((float *)text->keys[page] + (h * size + at) * n, key, sizeof *key * n);
            memcpy((float *)text->values[page] + (h * size + at) * n, value, sizeof *value * n);
            continue;
        }
        uint16_t *keys = (uint16_t *)text->keys[page] + h * size * n, *values = (uint16_t *)text->values[page] + h * size * n;
        for (size_t j = 0; j < n; j++) keys[j * size + at] = narrowed(key[j]);
        for (size_t j = 0; j < n; j++) values[at * n + j] = narrowed(value[j]);
    }
}

/* Sixteen numbers at any address, which the compiler keeps in registers as wide as there are. */
typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

/* y = x w, or added to y: w is n x columns, its rows `step` floats apart. Four sums at once, so that none waits for itself. */
EACH_CPU
static void multiply_row(const float *w, size_t step, int columns, const float *x, int n, float *y, int add) {
    enum { SUMS = 4 };
    int first = 0;
    for (; first + SUMS * LANES <= columns; first += SUMS * LANES) {
        lanes *to = (lanes *)(y + first), a = to[0], b = to[1], c = to[2], d = to[3];
        if (!add) a = b = c = d = (lanes){0};
        for (int j = 0; j < n; j++) {
            const lanes *row = (const lanes *)(w + (size_t)j * step + first);
            a += x[j] * row[0];
            b += x[j] * row[1];
            c += x[j] * row[2];
            d += x[j] * row[3];
        }
        to[0] = a;
        to[1] = b;
        to[2] = c;
        to[3] = d;
    }
    for (; first + LANES <= columns; first += LANES) {
        lanes *to = (lanes *)(y + first), a = to[0];
        if (!add) a = (lanes){0};
        for (int j = 0; j < n; j++) a += x[j] * *(const lanes *)(w + (size_t)j * step + first);
        to[0] = a;
    }
    for (; first < columns; first++) {
        float sum = add ? y[first] : 0.0f;
        for (int j = 0; j < n; j++) sum += x[j] * w[(size_t)j * step + (size_t)first];
        y[first] = sum;
    }
}

#ifdef BSTACK_X86
#define AVX512 __attribute__((target("avx512f")))

/* multiply_row for WIDE x LANES columns of half precision and ROWS rows at once, both constants. */
AVX512 INLINE void multiply_halves(const uint16_t *w, size_t step, const float *x, size_t x_step, int n, float *y, size_t y_step,
                                   int add, int rows, int wide) {
    __m512 sum[4][4];
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
        for (int c = 0; c < wide; c++)
            sum[r][c] = add ? _mm512_loadu_ps(y + (size_t)r * y_step + c * LANES) : _mm512_setzero_ps();
    for (int j = 0; j < n; j++, w += step)
        UNROLL
        for (int c = 0; c < wide; c++) {
            const __m512 part = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(w + c * LANES)));
            UNROLL
            for (int r = 0; r < rows; r++)
                sum[r][c] = _mm512_add_ps(sum[r][c], _mm512_mul_ps(_mm512_set1_ps(x[(size_t)r * x_step + (size_t)j]), part));
        }
    UNROLL
    for (int r = 0; r < rows; r++)
        UNROLL
        for (int c = 0; c < wide; c++) _mm512_storeu_ps(y + (size_t)r * y_step + c * LANES, sum[r][c]);
}

AVX512 INLINE void multiply_half_rows(const uint16_t *w, size_t step, int columns, const float *x, size_t x_step, int n, float *y,
                                      size_t y_step, int add, int rows) {
    int c = 0;
    for (; c + 4 * LANES <= columns; c += 4 * LANES) multiply_halves(w + c, step, x, x_step, n, y + c, y_step, add, rows, 4);
    for (; c < columns; c += LANES) multiply_halves(w + c, step, x, x_step, n, y + c, y_step, add, rows, 1);
}

AVX512 static void multiply_half_avx512(const uint16_t *w, size_t step, int columns, const float *x, size_t x_step, int rows, int n,
                                        float *y, size_t y_step, int add) {
    for (; rows >= 3; rows -= 3, x += 3 * x_step, y += 3 * y_step) multiply_half_rows(w, step, columns, x, x_step, n, y, y_step, add, 3);
    for (; rows; rows--, x += x_step, y += y_step) multiply_half_rows(w, step, columns, x, x_step, n, y, y_step, add, 1);
}
#endif

/* multiply_row for some rows and w of half precision; `room` takes n x columns floats. */
static void multiply_half(const uint16_t *w, size_t step, int columns, const float *x, size_t x_step, int rows, int n, float *y,
                          size_t y_step, int add, float *room) {
#ifdef BSTACK_X86
    if (bstack_kernels()->floats == 16 && columns % LANES == 0) {
        multiply_half_avx512(w, step, columns, x, x_step, rows, n, y, y_step, add);
        return;
    }
#endif
    for (int j = 0; j < n; j++) widen(room + (size_t)j * (size_t)columns, w + (size_t)j * step, columns);
    for (int r = 0; r < rows; r++)
        multiply_row(room, (size_t)columns, columns, x + (size_t)r * x_step, n, y + (size_t)r * y_step, add);
}

struct attention {
    const struct pass *pass;
    int tokens, heads;                 /* of a piece of work; the heads share their keys */
    size_t block, padded, room;        /* keys of a block and values of a head, filled up to panels; floats of a buffer */
    int pieces;
    atomic_int next;
    float *buffer;
};

static size_t attention_room(const struct bstack_decoder *d, struct attention *a) {
    const size_t n = (size_t)d->head_width, rows = (size_t)(a->tokens * a->heads);
    a->block = round_up((size_t)(d->half ? d->page : BLOCK), DENSE_PANEL);
    a->padded = round_up(n, DENSE_PANEL);
    return a->room = round_up(rows * (2 * n + a->block + 2) + (a->block + n) * a->padded + n * a->block, GROUP);
}

/* Attention of some tokens in a row, for heads that share their keys: block by block, as in arXiv 2205.14135. */
static void attend(const struct attention *a, int piece, float *query) {
    const struct pass *pass = a->pass;
    const struct bstack_decoder *d = pass->decoder;
    const int n = d->head_width, across = d->heads / a->heads, first = piece / across * a->tokens, head = piece % across * a->heads;
    const int count = pass->count - first < a->tokens ? pass->count - first : a->tokens, rows = count * a->heads;
    const struct bstack_text *text = pass->texts + first;
    const size_t shared = (size_t)(head / (d->heads / d->key_heads)), pages = (size_t)(pass->layer - d->layer) * (size_t)text->pages;
    const int block = d->half ? d->page : BLOCK, window = pass->layer->window, stop = text[count - 1].position + 1;
    float *sum = query + rows * n, *score = sum + rows * n, *most = score + (size_t)rows * a->block, *total = most + rows;
    float *keys = total + rows, *values = keys + (size_t)n * a->block;
    for (int r = 0; r < rows; r++) {
        memcpy(query + r * n, pass->places.query + (size_t)(first + r / a->heads) * pass->step + (head + r % a->heads) * n, sizeof *query * (size_t)n);
        bstack_scale(query + r * n, d->scale, n);
        most[r] = -INFINITY;
        total[r] = 0.0f;
    }
    memset(sum, 0, sizeof *sum * (size_t)(rows * n));
    const int seen = window && text->position + 1 > window ? text->position + 1 - window : 0;
    for (int start = seen / block * block; start < stop; start += block) {
        const int there = stop - start < block ? stop - start : block;
        const size_t page = pages + (size_t)(start / d->page), at = (shared * (size_t)d->page + (size_t)(start % d->page)) * (size_t)n;
        const void *const key = d->half ? (const void *)((const uint16_t *)text->keys[page] + at) : (const float *)text->keys[page] + at;
        const void *const value = d->half ? (const void *)((const uint16_t *)text->values[page] + at) : (const float *)text->values[page] + at;
        if (pass->in_a_row) {
            widen_rows(keys, a->block, key, n, block);
            widen_rows(values, a->padded, value, there, n);
            bstack_multiply_panels(keys, a->block, there, query, (size_t)n, rows, n, score, a->block, 0);
        } else if (d->half) {
            const int columns = (int)round_up((size_t)there, LANES) < block ? (int)round_up((size_t)there, LANES) : block;
            multiply_half(key, (size_t)block, columns, query, (size_t)n, rows, n, score, a->block, 0, keys);
        }
        for (int r = 0; r < rows; r++) {
            float *own = score + (size_t)r * a->block;
            const int position = text[r / a->heads].position, low = window && position + 1 - window > start ? position + 1 - window - start : 0;
            const int high = position + 1 - start < there ? position + 1 - start : there;
            if (!d->half)
                for (int t = low; t < high; t++) own[t] = bstack_dot(query + r * n, (const float *)key + t * n, n);
            const float factor = low < high ? bstack_soften(own + low, high - low, d->cap, most + r, total + r) : 1.0f;
            for (int t = 0; t < there; t++)
                if (t < low || t >= high) own[t] = 0.0f;
            if (factor != 1.0f) bstack_scale(sum + r * n, factor, n);
            if (!d->half) multiply_row(value, (size_t)n, n, own, there, sum + r * n, 1);
        }
        if (pass->in_a_row)
            bstack_multiply_panels(values, a->padded, n, score, a->block, rows, there, sum, (size_t)n, 1);
        else if (d->half)
            multiply_half(value, (size_t)n, n, score, a->block, rows, there, sum, (size_t)n, 1, values);
    }
    for (int r = 0; r < rows; r++) {
        bstack_scale(sum + r * n, 1.0f / total[r], n);
        memcpy(pass->places.normal + ((size_t)(first + r / a->heads) * (size_t)d->heads + (size_t)(head + r % a->heads)) * (size_t)n, sum + r * n,
               sizeof *sum * (size_t)n);
    }
}

static void attend_part(void *argument, int part) {
    struct attention *a = argument;
    for (int piece; (piece = atomic_fetch_add(&a->next, 1)) < a->pieces;) attend(a, piece, a->buffer + (size_t)part * a->room);
}

int bstack_attend(const struct pass *pass) {
    const struct bstack_decoder *d = pass->decoder;
    const int threads = bstack_threads(), group = d->heads / d->key_heads;
    struct attention a = {.pass = pass, .tokens = pass->in_a_row ? TOGETHER : 1, .heads = group};
    if (!pass->in_a_row && pass->count * d->key_heads < 4 * threads) a.heads = 1; /* pieces for all threads */
    a.pieces = (pass->count + a.tokens - 1) / a.tokens * (d->heads / a.heads);
    const int parts = a.pieces < threads ? a.pieces : threads;
    a.buffer = malloc(sizeof *a.buffer * attention_room(d, &a) * (size_t)parts);
    if (!a.buffer) return 1;
    bstack_parallel(attend_part, &a, parts);
    free(a.buffer);
    return 0;
}
