/* Run one token through a whole decoder of the Llama family. A layer has some ten small operations between its products, and
 * calling each from Python takes longer than all products.
 *
 * Sums run over sixteen lanes in a fixed order, so results do not depend on the instruction set.
 */
#include "kernels.h"

#include <math.h>

enum { LANES = 16 };

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

/* Normalise by the root mean square (Zhang and Sennrich, arXiv 1910.07467). */
EACH_CPU
static void normalise(float *restrict y, const float *restrict x, const float *restrict weight, float epsilon, int n) {
    const float factor = 1.0f / sqrtf(dot(x, x, n) / (float)n + epsilon);
    for (int j = 0; j < n; j++) y[j] = weight[j] * (x[j] * factor);
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

struct attention {
    const struct bstack_decoder *decoder;
    const struct bstack_layer *layer;
    const float *query;
    float *out, *scores;
    int tokens, capacity;
};

static void attend(void *argument, int head) {
    const struct attention *a = argument;
    const struct bstack_decoder *d = a->decoder;
    const int n = d->head_width;
    const size_t shared = (size_t)(head / (d->heads / d->key_heads)) * (size_t)a->capacity * (size_t)n;
    const float *query = a->query + (size_t)head * n, *keys = a->layer->keys + shared, *values = a->layer->values + shared;
    float *out = a->out + (size_t)head * n, *score = a->scores + (size_t)head * (size_t)a->capacity;
    float max = -INFINITY, sum = 0.0f;
    for (int t = 0; t < a->tokens; t++) {
        score[t] = d->scale * dot(query, keys + (size_t)t * n, n);
        if (score[t] > max) max = score[t];
    }
    for (int t = 0; t < a->tokens; t++) sum += score[t] = expf(score[t] - max);
    memset(out, 0, sizeof *out * (size_t)n);
    for (int t = 0; t < a->tokens; t++) add_scaled(out, values + (size_t)t * n, score[t] / sum, n);
}

EACH_CPU
static void gate_values(float *restrict gate, const float *restrict up, int n) {
    for (int j = 0; j < n; j++) gate[j] = gate[j] / (1.0f + expf(-gate[j])) * up[j];
}

static void prepare_heads(float *x, const float *weight, const struct bstack_decoder *d, int heads, const float *cosine,
                        const float *sine, float *scratch) {
    for (int h = 0; h < heads; h++) {
        float *head = x + (size_t)h * d->head_width;
        if (weight) {
            memcpy(scratch, head, sizeof *head * (size_t)d->head_width);
            normalise(head, scratch, weight, d->epsilon, d->head_width);
        }
        rotate_positions(head, cosine, sine, d->head_width);
    }
}

static int run_layer(const struct bstack_decoder *d, const struct bstack_layer *layer, float *x, const float *cosine,
                     const float *sine, int position, int capacity) {
    const int n = d->head_width, queries = d->heads * n, keys = d->key_heads * n;
    const int wide = d->width > queries ? d->width : queries;
    float *normal = d->scratch, *query = normal + wide, *key = query + wide, *value = key + keys;
    float *gate = value + keys, *up = gate + d->inner, *scores = up + d->inner;

    normalise(normal, x, layer->input_norm, d->epsilon, d->width);
    const struct bstack_matrix *inputs[] = {layer->query, layer->key, layer->value};
    float *outputs[] = {query, key, value};
    if (bstack_multiply(inputs, 3, normal, 1, outputs)) return 1;
    add_bias(query, layer->query_bias, queries);
    add_bias(key, layer->key_bias, keys);
    add_bias(value, layer->value_bias, keys);
    prepare_heads(query, layer->query_norm, d, d->heads, cosine, sine, normal);
    prepare_heads(key, layer->key_norm, d, d->key_heads, cosine, sine, normal);
    for (int h = 0; h < d->key_heads; h++) {
        const size_t at = ((size_t)h * (size_t)capacity + (size_t)position) * (size_t)n;
        memcpy(layer->keys + at, key + (size_t)h * n, sizeof *key * (size_t)n);
        memcpy(layer->values + at, value + (size_t)h * n, sizeof *value * (size_t)n);
    }
    struct attention attention = {d, layer, query, normal, scores, position + 1, capacity};
    bstack_parallel(attend, &attention, d->heads);
    if (bstack_multiply(&layer->out, 1, normal, 1, &query)) return 1;
    add_bias(query, layer->out_bias, d->width);
    add_scaled(x, query, 1.0f, d->width);

    normalise(normal, x, layer->post_norm, d->epsilon, d->width);
    const struct bstack_matrix *both[] = {layer->gate, layer->up};
    float *sides[] = {gate, up};
    if (bstack_multiply(both, 2, normal, 1, sides)) return 1;
    add_bias(gate, layer->gate_bias, d->inner);
    add_bias(up, layer->up_bias, d->inner);
    gate_values(gate, up, d->inner);
    if (bstack_multiply(&layer->down, 1, gate, 1, &normal)) return 1;
    add_bias(normal, layer->down_bias, d->width);
    add_scaled(x, normal, 1.0f, d->width);
    return 0;
}

size_t bstack_decoder_scratch(const struct bstack_decoder *d, int capacity) {
    const size_t queries = (size_t)d->heads * (size_t)d->head_width, keys = (size_t)d->key_heads * (size_t)d->head_width;
    const size_t wide = (size_t)d->width > queries ? (size_t)d->width : queries;
    return 2 * wide + 2 * keys + 2 * (size_t)d->inner + (size_t)d->heads * (size_t)capacity;
}

int bstack_decoder_step(const struct bstack_decoder *d, float *x, const float *cosine, const float *sine, int position,
                        int capacity, float *logits) {
    for (int i = 0; i < d->layers; i++)
        if (run_layer(d, d->layer + i, x, cosine, sine, position, capacity)) return 1;
    float *normal = d->scratch;
    normalise(normal, x, d->final_norm, d->epsilon, d->width);
    float *places[BSTACK_PARTS];
    for (int i = 0; i < d->head_parts; i++) {
        places[i] = logits;
        logits += d->head[i]->rows;
    }
    return bstack_multiply(d->head, d->head_parts, normal, 1, places);
}
