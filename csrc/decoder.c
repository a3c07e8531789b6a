/* Run one token of some texts through a whole decoder. A layer has some ten small operations between its products, and calling
 * each from Python takes longer than all products.
 *
 * Sums run over sixteen lanes in a fixed order, so results do not depend on the instruction set.
 */
#include "kernels.h"

#include <math.h>

enum { LANES = 16 };

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

EACH_CPU
static void add_scaled(float *restrict y, const float *restrict x, float factor, int n) {
    for (int j = 0; j < n; j++) y[j] += factor * x[j];
}

EACH_CPU
static void widen(float *restrict y, const uint16_t *restrict x, int n) {
    for (int j = 0; j < n; j++) y[j] = widened(x[j]);
}

/* Normalise by the root mean square (Zhang and Sennrich, arXiv 1910.07467). */
EACH_CPU
static void scale_by(float *restrict y, const float *restrict x, const float *restrict weight, float factor, int n) {
    for (int j = 0; j < n; j++) y[j] = weight[j] * (x[j] * factor);
}

static void normalise(float *y, const float *x, const float *weight, float epsilon, int n) {
    if (weight)
        scale_by(y, x, weight, 1.0f / sqrtf(dot(x, x, n) / (float)n + epsilon), n);
    else
        memcpy(y, x, sizeof *y * (size_t)n);
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

static void add_bias(float *y, const float *bias, int n, int count) {
    for (int k = 0; bias && k < count; k++) add_scaled(y + (size_t)k * (size_t)n, bias, 1.0f, n);
}

struct attention {
    const struct bstack_decoder *decoder;
    const struct bstack_layer *layer;
    const struct bstack_text *texts;
    const float *query;
    float *out, *scores;
    size_t step, room; /* floats of a text's queries, and of a head's scores with one row more */
};

/* Row `token` of a page, as floats; `row` has room for them. */
static const float *cached(const struct bstack_decoder *d, const void *page, size_t head, int token, float *row) {
    const size_t at = (head * (size_t)d->page + (size_t)(token % d->page)) * (size_t)d->head_width;
    if (!d->half) return (const float *)page + at;
    widen(row, (const uint16_t *)page + at, d->head_width);
    return row;
}

static void attend(void *argument, int part) {
    const struct attention *a = argument;
    const struct bstack_decoder *d = a->decoder;
    const int which = part / d->heads, head = part % d->heads, n = d->head_width;
    const struct bstack_text *text = a->texts + which;
    const size_t shared = (size_t)(head / (d->heads / d->key_heads)), first_page = (size_t)(a->layer - d->layer) * (size_t)text->pages;
    void *const *keys = text->keys + first_page, *const *values = text->values + first_page;
    const float *query = a->query + (size_t)which * a->step + (size_t)head * (size_t)n;
    float *out = a->out + ((size_t)which * (size_t)d->heads + (size_t)head) * (size_t)n;
    float *row = a->scores + (size_t)part * a->room, *score = row + n;
    const int tokens = text->position + 1, window = a->layer->window;
    const int first = window && tokens > window ? tokens - window : 0;
    float max = -INFINITY, sum = 0.0f;
    for (int t = first; t < tokens; t++) {
        score[t] = d->scale * dot(query, cached(d, keys[t / d->page], shared, t, row), n);
        if (d->cap > 0.0f) score[t] = d->cap * tanhf(score[t] / d->cap);
        if (score[t] > max) max = score[t];
    }
    for (int t = first; t < tokens; t++) sum += score[t] = expf(score[t] - max);
    memset(out, 0, sizeof *out * (size_t)n);
    for (int t = first; t < tokens; t++) add_scaled(out, cached(d, values[t / d->page], shared, t, row), score[t] / sum, n);
}

EACH_CPU
static void gate_values(float *restrict gate, const float *restrict up, int activation, int n) {
    if (activation == BSTACK_SILU)
        for (int j = 0; j < n; j++) gate[j] = gate[j] / (1.0f + expf(-gate[j])) * up[j];
    else
        for (int j = 0; j < n; j++) {
            const float inner = 0.7978845608f * (gate[j] + 0.044715f * gate[j] * gate[j] * gate[j]);
            gate[j] = 0.5f * gate[j] * (1.0f + tanhf(inner)) * up[j];
        }
}

/* Norms and rotary positions of a text's queries or keys. */
static void prepare_heads(const struct bstack_decoder *d, const struct bstack_layer *layer, const struct bstack_text *text,
                          const float *weight, float *x, int heads, float *scratch) {
    const int n = d->head_width, all = d->whole_norms ? heads * n : n;
    for (int j = 0; weight && j < heads * n; j += all) {
        memcpy(scratch, x + j, sizeof *x * (size_t)all);
        normalise(x + j, scratch, weight, d->epsilon, all);
    }
    if (layer->rope < 0) return;
    const size_t at = (size_t)layer->rope * (size_t)d->rotary;
    for (int h = 0; h < heads; h++) rotate_positions(x + (size_t)h * (size_t)n, text->cosine + at, text->sine + at, d->rotary);
}

/* Write a token's row of keys or values to its page. */
static void store(const struct bstack_decoder *d, void *page, int position, const float *x) {
    for (int h = 0; h < d->key_heads; h++, x += d->head_width) {
        const size_t at = ((size_t)h * (size_t)d->page + (size_t)(position % d->page)) * (size_t)d->head_width;
        if (d->half)
            for (int j = 0; j < d->head_width; j++) ((uint16_t *)page + at)[j] = narrowed(x[j]);
        else
            memcpy((float *)page + at, x, sizeof *x * (size_t)d->head_width);
    }
}

static size_t most(size_t a, size_t b) { return a > b ? a : b; }

struct places { /* in the scratch memory, for `count` texts */
    float *normal, *query, *gate, *scores;
    size_t all, room;
};

static struct places lay_out(const struct bstack_decoder *d, float *scratch, size_t count, size_t tokens) {
    const size_t queries = (size_t)(d->heads * d->head_width), keys = (size_t)(d->key_heads * d->head_width);
    const size_t width = (size_t)d->width, sizes[] = {count * most(width, most(queries, keys)), count * most(width, queries + 2 * keys),
                                                      count * 2 * (size_t)d->inner};
    struct places p = {.normal = scratch, .room = tokens + (size_t)d->head_width};
    p.all = sizes[0] + sizes[1] + sizes[2] + count * (size_t)d->heads * p.room;
    if (!scratch) return p;
    p.query = p.normal + sizes[0];
    p.gate = p.query + sizes[1];
    p.scores = p.gate + sizes[2];
    return p;
}

static void normalise_all(const struct bstack_decoder *d, float *y, const float *x, const float *weight, int count) {
    for (size_t k = 0; k < (size_t)count; k++)
        normalise(y + k * (size_t)d->width, x + k * (size_t)d->width, weight, d->epsilon, d->width);
}

/* Add what a half of the layer gives, after its bias and norm. */
static void add_to(const struct bstack_decoder *d, float *x, float *y, const float *bias, const float *norm, float *scratch, int count) {
    add_bias(y, bias, d->width, count);
    if (norm) {
        normalise_all(d, scratch, y, norm, count);
        y = scratch;
    }
    add_scaled(x, y, 1.0f, count * d->width);
}

static int run_layer(const struct bstack_decoder *d, const struct bstack_layer *layer, const struct bstack_text *texts, int count,
                     float *x, const struct places *p) {
    const int n = d->head_width, queries = d->heads * n, keys = d->key_heads * n, all = queries + 2 * keys;
    const int split = layer->key != NULL, gates = layer->up ? d->inner : 2 * d->inner;
    float *key = p->query + (split ? count * queries : queries), *value = key + (split ? count * keys : keys);
    const int step = split ? queries : all, key_step = split ? keys : all;

    normalise_all(d, p->normal, x, layer->input_norm, count);
    const struct bstack_matrix *inputs[] = {layer->query, layer->key, layer->value};
    float *outputs[] = {p->query, key, value};
    if (bstack_multiply(inputs, split ? 3 : 1, p->normal, count, outputs)) return 1;
    add_bias(p->query, layer->query_bias, step, count);
    add_bias(key, layer->key_bias, keys, count);
    add_bias(value, layer->value_bias, keys, count);
    for (int k = 0; k < count; k++) {
        const struct bstack_text *text = texts + k;
        const size_t page = (size_t)(layer - d->layer) * (size_t)text->pages + (size_t)(text->position / d->page);
        prepare_heads(d, layer, text, layer->query_norm, p->query + k * step, d->heads, p->normal);
        prepare_heads(d, layer, text, layer->key_norm, key + k * key_step, d->key_heads, p->normal);
        store(d, text->keys[page], text->position, key + k * key_step);
        store(d, text->values[page], text->position, value + k * key_step);
    }
    struct attention attention = {d, layer, texts, p->query, p->normal, p->scores, (size_t)step, p->room};
    bstack_parallel(attend, &attention, count * d->heads);
    float *const both = p->query;
    if (bstack_multiply(&layer->out, 1, p->normal, count, &both)) return 1;
    add_to(d, x, both, layer->out_bias, layer->attention_norm, p->normal, count);

    normalise_all(d, p->normal, x, layer->post_norm, count);
    float *up = p->gate + (layer->up ? count * d->inner : d->inner);
    const struct bstack_matrix *sides[] = {layer->gate, layer->up};
    float *places[] = {p->gate, up};
    if (bstack_multiply(sides, layer->up ? 2 : 1, p->normal, count, places)) return 1;
    add_bias(p->gate, layer->gate_bias, gates, count);
    add_bias(up, layer->up_bias, d->inner, count);
    for (int k = 0; k < count; k++) {
        gate_values(p->gate + (size_t)k * (size_t)gates, up + (size_t)k * (size_t)gates, d->activation, d->inner);
        memmove(p->gate + (size_t)k * (size_t)d->inner, p->gate + (size_t)k * (size_t)gates, sizeof *up * (size_t)d->inner);
    }
    if (bstack_multiply(&layer->down, 1, p->gate, count, &both)) return 1;
    add_to(d, x, both, layer->down_bias, layer->feed_norm, p->normal, count);
    return 0;
}

size_t bstack_decoder_scratch(const struct bstack_decoder *d, int count, int tokens) {
    return lay_out(d, NULL, (size_t)count, (size_t)tokens).all;
}

int bstack_decoder_step(const struct bstack_decoder *d, const struct bstack_text *texts, int count, float *x, float *out) {
    size_t tokens = 0;
    for (int k = 0; k < count; k++) tokens = most(tokens, (size_t)texts[k].position + 1);
    const struct places p = lay_out(d, d->scratch, (size_t)count, tokens);
    for (int i = 0; i < d->layers; i++)
        if (run_layer(d, d->layer + i, texts, count, x, &p)) return 1;
    normalise_all(d, d->head_parts ? p.normal : out, x, d->final_norm, count);
    float *places[BSTACK_PARTS];
    for (int i = 0; i < d->head_parts; i++) {
        places[i] = out;
        out += (size_t)count * (size_t)d->head[i]->rows;
    }
    return d->head_parts ? bstack_multiply(d->head, d->head_parts, p.normal, count, places) : 0;
}
