/* Run tokens through a decoder: one token of each of some texts through all layers, or several of one text through a layer. A
 * layer has some ten small operations between its products, and calling each from Python takes longer than all products.
 *
 * Sums run over sixteen lanes in a fixed order and the exponential is one of additions and multiplications, so a step's results
 * do not depend on the instruction set.
 */
#include "kernels.h"

#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>

#ifdef BSTACK_X86
#include <immintrin.h>
#endif

enum {
    LANES = 16,
    FEW = 8,      /* up to so many tokens the packed kernels multiply; of more in a row, rows are decoded */
    GRAIN = 8,    /* tokens of a part of the small operations */
    TOGETHER = 48, /* tokens in a row whose attention is computed together */
    BLOCK = 64,   /* keys that are taken together where the caches have no pages */
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
static float dot(const float *restrict a, const float *restrict b, int n) {
    float lane[LANES] = {0};
    int j = 0;
    for (; j + LANES <= n; j += LANES)
        for (int l = 0; l < LANES; l++) lane[l] += a[j + l] * b[j + l];
    for (int l = 0; j + l < n; l++) lane[l] += a[j + l] * b[j + l];
    for (int half = LANES / 2; half; half /= 2)
        for (int l = 0; l < half; l++) lane[l] += lane[l + half];
    return lane[0];
}

/* e^x to the last bit or two: 2^k e^r, r within ln(2) / 2, by a polynomial (Cephes' expf). Beyond 88 on either side it is as at 88. */
INLINE float exponential(float x) {
    const float round = 0x1.8p23f; /* adding it rounds to an integer, which stands in the low bits */
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    const float shifted = x * 1.44269504f + round, k = shifted - round;
    const float r = x - k * 0.693359375f - k * -2.12194440e-4f;
    float y = 1.9875691500e-4f;
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * (r * r) + r + 1.0f;
    uint32_t bits;
    memcpy(&bits, &shifted, 4);
    bits = (bits + 127u) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return y * power;
}

INLINE float hyperbolic_tangent(float x) { return 1.0f - 2.0f / (exponential(2.0f * x) + 1.0f); }

EACH_CPU
static void add_scaled(float *restrict y, const float *restrict x, float factor, int n) {
    for (int j = 0; j < n; j++) y[j] += factor * x[j];
}

EACH_CPU
static void scale(float *x, float factor, int n) {
    for (int j = 0; j < n; j++) x[j] *= factor;
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

/* Normalise by the root mean square (Zhang and Sennrich, arXiv 1910.07467). */
static float norm_factor(const float *x, float epsilon, int n) { return 1.0f / sqrtf(dot(x, x, n) / (float)n + epsilon); }

EACH_CPU
static void scale_by(float *restrict y, const float *restrict x, const float *restrict weight, float factor, int n) {
    for (int j = 0; j < n; j++) y[j] = weight[j] * (x[j] * factor);
}

static void normalise(float *y, const float *x, const float *weight, float epsilon, int n) {
    if (weight)
        scale_by(y, x, weight, norm_factor(x, epsilon, n), n);
    else
        memcpy(y, x, sizeof *y * (size_t)n);
}

EACH_CPU
static void normalise_in_place(float *restrict x, const float *restrict weight, float epsilon, int n) {
    const float factor = norm_factor(x, epsilon, n);
    for (int j = 0; j < n; j++) x[j] = weight[j] * (x[j] * factor);
}

/* Apply the rotary position (Su et al., arXiv 2104.09864) to one head, halves paired. */
EACH_CPU
static void rotate_positions(float *restrict x, const float *restrict cosine, const float *restrict sine, int n) {
    const int half = n / 2;
    for (int j = 0; j < half; j++) {
        const float a = x[j], b = x[half + j];
        x[j] = a * cosine[j] - b * sine[j];
        x[half + j] = b * cosine[half + j] + a * sine[half + j];
    }
}

static void add_bias(float *y, const float *bias, int n) {
    if (bias) add_scaled(y, bias, 1.0f, n);
}

EACH_CPU
static void gate_values(float *restrict y, const float *restrict gate, const float *restrict up, int activation, int n) {
    if (activation == BSTACK_SILU)
        for (int j = 0; j < n; j++) y[j] = gate[j] / (1.0f + exponential(-gate[j])) * up[j];
    else
        for (int j = 0; j < n; j++) {
            const float inner = 0.7978845608f * (gate[j] + 0.044715f * gate[j] * gate[j] * gate[j]);
            y[j] = 0.5f * gate[j] * (1.0f + hyperbolic_tangent(inner)) * up[j];
        }
}

struct places { /* in the scratch memory, for `count` tokens */
    float *normal, *query, *gate, *inner, *rotated, *chances, *share, *gathered, *added;
    int32_t *chosen;
};

struct pass { /* one layer for some tokens */
    const struct bstack_decoder *decoder;
    const struct bstack_layer *layer;
    const struct bstack_text *texts; /* of each token */
    int count, in_a_row;             /* the tokens are of one text, in a row */
    int rows;                        /* of the expert that runs */
    float *x, *key, *value, *up;
    size_t step, key_step, gate_step; /* floats from one token's queries, keys, gates to the next */
    struct places places;
};

struct stage {
    const struct pass *pass;
    void (*work)(const struct pass *, size_t);
    int count;
};

static void run_stage(void *argument, int part) {
    const struct stage *stage = argument;
    for (int k = part * GRAIN; k < stage->count && k < (part + 1) * GRAIN; k++) stage->work(stage->pass, (size_t)k);
}

/* Run a small operation for each of some tokens. */
static void each_token(const struct pass *pass, int count, void (*work)(const struct pass *, size_t)) {
    struct stage stage = {pass, work, count};
    bstack_parallel(run_stage, &stage, (count + GRAIN - 1) / GRAIN);
}

/* Multiply some matrices by the same rows: tokens of several texts as they are packed, so that each has the same bits alone. */
static int multiply_all(const struct pass *pass, const struct bstack_matrix *const *matrices, int count, const float *x, int tokens,
                        float *const *y) {
    static const unsigned rotated_kinds = 1u << BSTACK_TRELLIS | 1u << BSTACK_TRELLIS5;
    if (!pass->in_a_row || tokens <= FEW) return bstack_multiply(matrices, count, x, tokens, y);
    float *const rotated = pass->places.rotated;
    int ready = 0;
    for (int i = 0; i < count; i++) {
        struct bstack_matrix taken;
        bstack_copy_matrix(&taken, matrices[i]);
        unsigned kinds = 0;
        for (int level = 0; level < taken.count; level++) kinds |= 1u << taken.kind[level];
        const size_t n = (size_t)taken.columns, rows = (size_t)taken.rows;
        if ((kinds & rotated_kinds) && !ready++) {
            memcpy(rotated, x, sizeof *x * n * (size_t)tokens);
            bstack_rotate(rotated, tokens, taken.columns);
        }
        if (!kinds) memset(y[i], 0, sizeof **y * rows * (size_t)tokens);
        if ((kinds & rotated_kinds) && bstack_multiply_decoded(&taken, rotated_kinds, rotated, tokens, y[i], rows, 0)) return 1;
        if ((kinds & ~rotated_kinds) &&
            bstack_multiply_decoded(&taken, ~rotated_kinds, x, tokens, y[i], rows, (kinds & rotated_kinds) != 0))
            return 1;
    }
    return 0;
}

/* Norms and rotary positions of a token's queries or keys. */
static void prepare_heads(const struct pass *pass, const struct bstack_text *text, const float *weight, float *x, int heads) {
    const struct bstack_decoder *d = pass->decoder;
    const int n = d->head_width, all = d->whole_norms ? heads * n : n;
    for (int j = 0; weight && j < heads * n; j += all) normalise_in_place(x + j, weight, d->epsilon, all);
    if (pass->layer->rope < 0) return;
    const size_t at = (size_t)pass->layer->rope * (size_t)d->rotary;
    for (int h = 0; h < heads; h++) rotate_positions(x + (size_t)h * (size_t)n, text->cosine + at, text->sine + at, d->rotary);
}

/* Write a token's keys and values to their pages. */
static void store(const struct pass *pass, const struct bstack_text *text, const float *key, const float *value) {
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

static void before_attention(const struct pass *pass, size_t k) {
    const size_t n = (size_t)pass->decoder->width;
    normalise(pass->places.normal + k * n, pass->x + k * n, pass->layer->input_norm, pass->decoder->epsilon, (int)n);
}

static void prepare_token(const struct pass *pass, size_t k) {
    const struct bstack_decoder *d = pass->decoder;
    const struct bstack_layer *layer = pass->layer;
    const int keys = d->key_heads * d->head_width;
    float *query = pass->places.query + k * pass->step, *key = pass->key + k * pass->key_step, *value = pass->value + k * pass->key_step;
    add_bias(query, layer->query_bias, (int)pass->step);
    add_bias(key, layer->key_bias, keys);
    add_bias(value, layer->value_bias, keys);
    prepare_heads(pass, pass->texts + k, layer->query_norm, query, d->heads);
    prepare_heads(pass, pass->texts + k, layer->key_norm, key, d->key_heads);
    store(pass, pass->texts + k, key, value);
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

/* Make weights of scores, relative to the largest so far, and add them to `sum`; return the factor for what was summed before. */
EACH_CPU
static float soften(float *restrict score, int n, float cap, float *most, float *sum) {
    float lane[LANES], total[LANES] = {0};
    int j = 0;
    if (cap > 0.0f)
        for (j = 0; j < n; j++) score[j] = cap * hyperbolic_tangent(score[j] / cap);
    for (int l = 0; l < LANES; l++) lane[l] = *most;
    for (j = 0; j + LANES <= n; j += LANES)
        for (int l = 0; l < LANES; l++) lane[l] = score[j + l] > lane[l] ? score[j + l] : lane[l];
    for (int l = 0; j + l < n; l++) lane[l] = score[j + l] > lane[l] ? score[j + l] : lane[l];
    for (int half = LANES / 2; half; half /= 2)
        for (int l = 0; l < half; l++) lane[l] = lane[l + half] > lane[l] ? lane[l + half] : lane[l];
    const float largest = lane[0], factor = exponential(*most - largest);
    for (j = 0; j < n; j++) score[j] = exponential(score[j] - largest);
    for (j = 0; j + LANES <= n; j += LANES)
        for (int l = 0; l < LANES; l++) total[l] += score[j + l];
    for (int l = 0; j + l < n; l++) total[l] += score[j + l];
    for (int half = LANES / 2; half; half /= 2)
        for (int l = 0; l < half; l++) total[l] += total[l + half];
    *most = largest;
    *sum = *sum * factor + total[0];
    return factor;
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
        scale(query + r * n, d->scale, n);
        most[r] = -INFINITY;
        total[r] = 0.0f;
    }
    memset(sum, 0, sizeof *sum * (size_t)(rows * n));
    const int seen = window && text->position + 1 > window ? text->position + 1 - window : 0;
    for (int start = seen / block * block; start < stop; start += block) {
        const int there = stop - start < block ? stop - start : block;
        const size_t page = pages + (size_t)(start / d->page), at = (shared * (size_t)d->page + (size_t)(start % d->page)) * (size_t)n;
        const float *value = values;
        size_t value_step = a->padded;
        if (d->half) {
            widen_rows(keys, a->block, (const uint16_t *)text->keys[page] + at, n, block);
            widen_rows(values, a->padded, (const uint16_t *)text->values[page] + at, there, n);
        } else {
            value = (const float *)text->values[page] + at;
            value_step = (size_t)n;
        }
        if (pass->in_a_row)
            bstack_multiply_panels(keys, a->block, there, query, (size_t)n, rows, n, score, a->block, 0);
        for (int r = 0; r < rows; r++) {
            float *own = score + (size_t)r * a->block;
            const int position = text[r / a->heads].position, low = window && position + 1 - window > start ? position + 1 - window - start : 0;
            const int high = position + 1 - start < there ? position + 1 - start : there;
            if (!d->half)
                for (int t = low; t < high; t++) own[t] = dot(query + r * n, (const float *)text->keys[page] + at + t * n, n);
            else if (!pass->in_a_row)
                multiply_row(keys, a->block, block, query + r * n, n, own, 0);
            const float factor = low < high ? soften(own + low, high - low, d->cap, most + r, total + r) : 1.0f;
            for (int t = 0; t < there; t++)
                if (t < low || t >= high) own[t] = 0.0f;
            if (factor != 1.0f) scale(sum + r * n, factor, n);
            if (!pass->in_a_row) multiply_row(value, value_step, n, own, there, sum + r * n, 1);
        }
        if (pass->in_a_row) bstack_multiply_panels(value, value_step, n, score, a->block, rows, there, sum, (size_t)n, 1);
    }
    for (int r = 0; r < rows; r++) {
        scale(sum + r * n, 1.0f / total[r], n);
        memcpy(pass->places.normal + ((size_t)(first + r / a->heads) * (size_t)d->heads + (size_t)(head + r % a->heads)) * (size_t)n, sum + r * n,
               sizeof *sum * (size_t)n);
    }
}

static void attend_part(void *argument, int part) {
    struct attention *a = argument;
    for (int piece; (piece = atomic_fetch_add(&a->next, 1)) < a->pieces;) attend(a, piece, a->buffer + (size_t)part * a->room);
}

static int attend_all(const struct pass *pass) {
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

/* Add what a half of the layer gives, after its bias and norm. */
static void add_to(const struct pass *pass, size_t k, const float *bias, const float *norm) {
    const size_t n = (size_t)pass->decoder->width;
    float *y = pass->places.query + k * n;
    add_bias(y, bias, (int)n);
    if (norm) normalise_in_place(y, norm, pass->decoder->epsilon, (int)n);
    add_scaled(pass->x + k * n, y, 1.0f, (int)n);
}

static void after_attention(const struct pass *pass, size_t k) {
    const size_t n = (size_t)pass->decoder->width;
    add_to(pass, k, pass->layer->out_bias, pass->layer->attention_norm);
    normalise(pass->places.normal + k * n, pass->x + k * n, pass->layer->post_norm, pass->decoder->epsilon, (int)n);
}

static void gate_token(const struct pass *pass, size_t k) {
    const struct bstack_layer *layer = pass->layer;
    const int n = pass->decoder->inner;
    float *gate = pass->places.gate + k * pass->gate_step, *up = pass->up + k * pass->gate_step;
    add_bias(gate, layer->gate_bias, (int)pass->gate_step);
    add_bias(up, layer->up_bias, n);
    gate_values(pass->places.inner + k * (size_t)n, gate, up, pass->decoder->activation, n);
}

static void after_feed(const struct pass *pass, size_t k) { add_to(pass, k, pass->layer->down_bias, pass->layer->feed_norm); }

/* Choose a token's experts: the likeliest, of equal ones the first, and how much each counts. */
static void choose(const struct pass *pass, size_t k) {
    const struct bstack_decoder *d = pass->decoder;
    float *chance = pass->places.chances + k * (size_t)d->experts, *share = pass->places.share + k * (size_t)d->chosen;
    int32_t *chosen = pass->places.chosen + k * (size_t)d->chosen;
    float most = -INFINITY, sum = 0.0f, taken = 0.0f;
    soften(chance, d->experts, 0.0f, &most, &sum);
    for (int c = 0; c < d->chosen; c++) {
        int best = -1;
        for (int e = 0; e < d->experts; e++)
            if (chance[e] >= 0.0f && (best < 0 || chance[e] > chance[best])) best = e;
        chosen[c] = best < 0 ? c : best; /* of a token that holds a NaN */
        share[c] = best < 0 ? NAN : chance[best] / sum;
        taken += share[c];
        if (best >= 0) chance[best] = -1.0f;
    }
    for (int c = 0; d->normalised && c < d->chosen; c++) share[c] /= taken;
}

static void gate_row(const struct pass *pass, size_t k) {
    const int n = pass->decoder->expert_inner;
    const float *gate = pass->places.gate + k * 2 * (size_t)n;
    gate_values(pass->places.inner + k * (size_t)n, gate, gate + n, pass->decoder->activation, n);
}

/* Run the experts, each for the tokens that chose it, and add what they give in their order. */
static int run_experts(struct pass *pass) {
    const struct bstack_decoder *d = pass->decoder;
    const struct bstack_layer *layer = pass->layer;
    const struct places *p = &pass->places;
    const size_t n = (size_t)d->width, count = (size_t)pass->count;
    float *const chances = p->chances;
    if (layer->router) {
        if (bstack_multiply_dense(layer->router, n, d->experts, d->width, p->normal, n, pass->count, chances, (size_t)d->experts)) return 1;
    } else if (multiply_all(pass, &layer->packed_router, 1, p->normal, pass->count, &chances)) {
        return 1;
    }
    each_token(pass, pass->count, choose);
    memset(p->query, 0, sizeof *p->query * n * count);
    for (int e = 0; e < d->experts; e++) {
        int rows = 0;
        for (size_t at = 0; at < count * (size_t)d->chosen; at++)
            if (p->chosen[at] == e) memcpy(p->gathered + n * (size_t)rows++, p->normal + at / (size_t)d->chosen * n, sizeof *p->normal * n);
        if (!rows) continue;
        if (multiply_all(pass, layer->expert_gate + e, 1, p->gathered, rows, &p->gate)) return 1;
        each_token(pass, rows, gate_row);
        if (multiply_all(pass, layer->expert_down + e, 1, p->inner, rows, &p->added)) return 1;
        const float *added = p->added;
        for (size_t at = 0; at < count * (size_t)d->chosen; at++)
            if (p->chosen[at] == e) {
                add_scaled(p->query + at / (size_t)d->chosen * n, added, p->share[at], d->width);
                added += n;
            }
    }
    return 0;
}

static int run_feed(struct pass *pass) {
    const struct bstack_decoder *d = pass->decoder;
    const struct bstack_layer *layer = pass->layer;
    const struct places *p = &pass->places;
    pass->gate_step = (size_t)(layer->up ? d->inner : 2 * d->inner);
    pass->up = p->gate + (layer->up ? (size_t)pass->count * (size_t)d->inner : (size_t)d->inner);
    const struct bstack_matrix *sides[] = {layer->gate, layer->up};
    float *places[] = {p->gate, pass->up};
    if (multiply_all(pass, sides, layer->up ? 2 : 1, p->normal, pass->count, places)) return 1;
    each_token(pass, pass->count, gate_token);
    return multiply_all(pass, &layer->down, 1, p->inner, pass->count, &p->query);
}

static size_t most_of(size_t a, size_t b) { return a > b ? a : b; }

/* Lay out the scratch memory; with null, only find its size. */
static size_t lay_out(const struct bstack_decoder *d, size_t count, struct places *p, float *scratch) {
    const size_t queries = (size_t)(d->heads * d->head_width), keys = (size_t)(d->key_heads * d->head_width), width = (size_t)d->width;
    const size_t inner = (size_t)most_of((size_t)d->inner, (size_t)d->expert_inner), all = most_of(width, queries);
    const size_t experts = (size_t)d->experts, chosen = (size_t)d->chosen;
    size_t at = 0;
#define TAKE(pointer, floats) ((pointer) = scratch ? (void *)(scratch + at) : NULL, at += count * (floats))
    TAKE(p->normal, all);
    TAKE(p->query, most_of(width, queries + 2 * keys));
    TAKE(p->gate, 2 * inner);
    TAKE(p->inner, inner);
    TAKE(p->rotated, most_of(all, inner));
    TAKE(p->chances, experts);
    TAKE(p->share, chosen);
    TAKE(p->chosen, chosen);
    TAKE(p->gathered, experts ? width : 0);
    TAKE(p->added, experts ? width : 0);
#undef TAKE
    return at;
}

static int run_layer(const struct bstack_decoder *d, const struct bstack_layer *layer, const struct bstack_text *texts, int count,
                     int in_a_row, float *x, float *scratch) {
    const size_t n = (size_t)d->head_width, queries = (size_t)d->heads * n, keys = (size_t)d->key_heads * n;
    const int split = layer->key != NULL;
    struct pass pass = {.decoder = d, .layer = layer, .texts = texts, .count = count, .in_a_row = in_a_row, .x = x};
    lay_out(d, (size_t)count, &pass.places, scratch);
    const struct places *p = &pass.places;
    pass.step = split ? queries : queries + 2 * keys;
    pass.key_step = split ? keys : pass.step;
    pass.key = p->query + (split ? (size_t)count * queries : queries);
    pass.value = pass.key + (split ? (size_t)count * keys : keys);

    each_token(&pass, count, before_attention);
    const struct bstack_matrix *inputs[] = {layer->query, layer->key, layer->value};
    float *outputs[] = {p->query, pass.key, pass.value};
    if (multiply_all(&pass, inputs, split ? 3 : 1, p->normal, count, outputs)) return 1;
    each_token(&pass, count, prepare_token);
    if (attend_all(&pass) || multiply_all(&pass, &layer->out, 1, p->normal, count, &p->query)) return 1;
    each_token(&pass, count, after_attention);
    if (layer->gate ? run_feed(&pass) : run_experts(&pass)) return 1;
    each_token(&pass, count, after_feed);
    return 0;
}

size_t bstack_decoder_scratch(const struct bstack_decoder *d, int count) {
    struct places places;
    return lay_out(d, (size_t)count, &places, NULL);
}

int bstack_decoder_read(const struct bstack_decoder *d, int layer, const struct bstack_text *texts, int count, float *x, float *scratch) {
    return run_layer(d, d->layer + layer, texts, count, 1, x, scratch);
}

int bstack_decoder_step(const struct bstack_decoder *d, const struct bstack_text *texts, int count, float *x, float *scratch,
                        float *out) {
    for (int i = 0; i < d->layers; i++)
        if (run_layer(d, d->layer + i, texts, count, 0, x, scratch)) return 1;
    float *const normal = d->head_parts ? scratch : out, *places[BSTACK_PARTS];
    for (size_t k = 0; k < (size_t)count; k++)
        normalise(normal + k * (size_t)d->width, x + k * (size_t)d->width, d->final_norm, d->epsilon, d->width);
    for (int i = 0; i < d->head_parts; i++) {
        places[i] = out;
        out += (size_t)count * (size_t)d->head[i]->rows;
    }
    return d->head_parts ? bstack_multiply(d->head, d->head_parts, normal, count, places) : 0;
}
