/* Run tokens through a decoder: one token of each of some texts through all layers, or several of one text through a layer. A
 * layer has some ten small operations between its products, and calling each from Python takes longer than all products.
 */
#include "decoder.h"

#include <math.h>

enum {
    FEW = 8,   /* up to so many tokens the packed kernels multiply; of more in a row, rows are decoded */
    GRAIN = 8, /* tokens of a part of the small operations */
};

/* Normalise by the root mean square (Zhang and Sennrich, arXiv 1910.07467). */
static float norm_factor(const float *x, float epsilon, int n) { return 1.0f / sqrtf(bstack_dot(x, x, n) / (float)n + epsilon); }

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
    if (bias) bstack_add_scaled(y, bias, 1.0f, n);
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
    bstack_store(pass, pass->texts + k, key, value);
}

/* Add what a half of the layer gives, after its bias and norm. */
static void add_to(const struct pass *pass, size_t k, const float *bias, const float *norm) {
    const size_t n = (size_t)pass->decoder->width;
    float *y = pass->places.query + k * n;
    add_bias(y, bias, (int)n);
    if (norm) normalise_in_place(y, norm, pass->decoder->epsilon, (int)n);
    bstack_add_scaled(pass->x + k * n, y, 1.0f, (int)n);
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
    bstack_soften(chance, d->experts, 0.0f, &most, &sum);
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
                bstack_add_scaled(p->query + at / (size_t)d->chosen * n, added, p->share[at], d->width);
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
    if (bstack_attend(&pass) || multiply_all(&pass, &layer->out, 1, p->normal, count, &p->query)) return 1;
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
