/* Compares what every instruction set of this CPU computes with what the portable kernels do, bit for bit, on matrices of odd
 * shapes in memory of exactly their size; the argument names an instruction set that must be there. test_builds.py builds and
 * runs it with other compilers, C libraries and sanitizers. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bstack.h"

static uint32_t state = 1;
static uint32_t next(void) { return state = state * 1664525u + 1013904223u, state >> 8; }

static uint16_t half(void) { return (uint16_t)((next() & 0x8000u) | (0x2400u + next() % 0x1000u)); } /* 2^-6 to 2^-2 in size */

static void put_halves(uint8_t *at, size_t count) {
    for (size_t i = 0; i < count; i++) {
        const uint16_t value = half();
        memcpy(at + 2 * i, &value, 2);
    }
}

static uint8_t *random_bytes(size_t count) {
    uint8_t *bytes = malloc(count + 1);
    for (size_t i = 0; i < count; i++) bytes[i] = (uint8_t)next();
    return bytes;
}

static uint8_t *block(size_t codes, size_t halves) {
    uint8_t *bytes = random_bytes(codes + 2 * halves);
    put_halves(bytes + codes, halves);
    return bytes;
}

/* Layouts: format/SPEC.md, section 6. */
static uint8_t *spqr_block(int m, int n, int bits, int group) {
    const size_t start = ((size_t)(2 * n) + 63) / 64 * 64, tile = (size_t)(2 * bits * group + 20);
    const size_t tiles = (size_t)((m + 15) / 16) * (size_t)((n + group - 1) / group);
    uint8_t *bytes = random_bytes(start + tiles * tile);
    uint16_t *order = malloc(sizeof *order * (size_t)n);
    for (int i = 0; i < n; i++) order[i] = (uint16_t)i;
    for (int i = n - 1; i > 0; i--) {
        const uint32_t other = next() % (uint32_t)(i + 1);
        const uint16_t kept = order[i];
        order[i] = order[other], order[other] = kept;
    }
    memcpy(bytes, order, sizeof *order * (size_t)n);
    free(order);
    for (size_t i = 1; i <= tiles; i++) put_halves(bytes + start + i * tile - 8, 4);
    return bytes;
}

static uint8_t *outliers_block(int m, int n) {
    uint32_t pointer[128] = {0}; /* rows are 70 at most */
    const uint32_t most = next() % 3 ? (uint32_t)n / 20 : (uint32_t)n;
    for (int i = 0; i < m; i++) pointer[i + 1] = pointer[i] + next() % (most + 1);
    const size_t start = 4 * (size_t)(m + 1), count = pointer[m];
    uint8_t *bytes = random_bytes(start + 4 * count);
    memcpy(bytes, pointer, start);
    for (size_t k = 0; k < count; k++) {
        const uint16_t input = (uint16_t)(next() % (uint32_t)n);
        memcpy(bytes + start + 2 * k, &input, 2);
    }
    put_halves(bytes + start + 2 * count, count);
    return bytes;
}

/* One SpQR block, in half of them outliers, in half a trellis block after them. */
static void fill_spqr(struct bstack_matrix *matrix) {
    const int m = matrix->rows, n = matrix->columns, bits = 3 + (int)(next() % 2), group = 16 << next() % 4;
    int count = 1;
    matrix->kind[0] = BSTACK_SPQR, matrix->rank[0] = (uint8_t)(group + bits), matrix->block[0] = spqr_block(m, n, bits, group);
    if (next() % 2) matrix->kind[count] = BSTACK_OUTLIERS, matrix->rank[count] = 0, matrix->block[count++] = outliers_block(m, n);
    if (next() % 2) {
        const int more = (int)(next() % 2);
        matrix->kind[count] = more ? BSTACK_TRELLIS5 : BSTACK_TRELLIS, matrix->rank[count] = 2;
        matrix->block[count++] = block((size_t)(m + 3 + more) * (size_t)((n + 3) / 4), (size_t)m);
    }
    matrix->count = count;
}

static float *random_floats(size_t count, float limit) {
    float *x = malloc(sizeof *x * count);
    for (size_t i = 0; i < count; i++) x[i] = ((float)(int)next() / 8388608.0f - 1.0f) * limit;
    return x;
}

/* Products, rows and looked-up rows of a matrix in one array. */
static float *results(const struct bstack_matrix *matrix, const float *x, int tokens, size_t *bytes) {
    const int m = matrix->rows, n = matrix->columns, start = m / 3, looked_up = 3;
    const size_t products = (size_t)(tokens * m), rows = (size_t)((m - start) * n);
    *bytes = sizeof(float) * (products + 2 * rows + (size_t)(looked_up * n));
    float *out = malloc(*bytes), *at = out;
    if (bstack_multiply(&matrix, 1, x, tokens, &at)) exit(3);
    at += products;
    const unsigned rotated = 1u << BSTACK_TRELLIS | 1u << BSTACK_TRELLIS5;
    bstack_decode_rows(matrix, rotated, start, m, at);
    bstack_decode_rows(matrix, ~rotated, start, m, at + rows);
    const int64_t index[] = {m - 1, 0, m / 2};
    bstack_lookup(matrix, index, looked_up, at + 2 * rows);
    return out;
}

static void compare_matrices(const char *const *names, int count) {
    for (int round = 0; round < 400; round++) {
        const int m = 1 + (int)(next() % 70), n = 1 + (int)(next() % 700), tokens = 1 + (int)(next() % 9);
        struct bstack_matrix matrix = {.rows = m, .columns = n, .count = 1 + (int)(next() % 3)};
        if (round % 2) fill_spqr(&matrix);
        for (int level = 0; round % 2 == 0 && level < matrix.count; level++) {
            const int rank = next() % 2 ? 1 + (int)(next() % 16) : 0, more = (int)(next() % 2);
            matrix.kind[level] = rank ? BSTACK_SIGN : more ? BSTACK_TRELLIS5 : BSTACK_TRELLIS;
            matrix.rank[level] = (uint8_t)(rank ? rank : 2);
            matrix.block[level] = rank ? block((size_t)m * (size_t)((n + 7) / 8), (size_t)rank * (size_t)(m + n))
                                       : block((size_t)(m + 3 + more) * (size_t)((n + 3) / 4), (size_t)m);
        }
        float *x = random_floats((size_t)(tokens * n), 8.0f), *expected = NULL;
        for (int k = 0; k < count; k++) {
            size_t bytes;
            bstack_use(names[k]);
            float *found = results(&matrix, x, tokens, &bytes);
            if (!expected) {
                expected = found;
                continue;
            }
            if (memcmp(expected, found, bytes)) {
                fprintf(stderr, "%s, round %d: %d x %d, %d tokens, %d blocks of kind %d first\n", names[k], round, m, n, tokens,
                        matrix.count, matrix.kind[0]);
                exit(1);
            }
            free(found);
        }
        free(x), free(expected);
        for (int level = 0; level < matrix.count; level++) free((void *)matrix.block[level]);
    }
}

int bstack_trellis_encode(float *target, const float *original, int columns, int rows, const float *feedback,
                          const float *table, const float *scale, const float *weight, uint8_t *code, float *error);

/* Encode some columns of odd lengths, which gives the same codes with every instruction set. */
static void compare_encoders(const char *const *names, int count) {
    for (int round = 0; round < 6; round++) {
        const int rows = 1 + round * 13, columns = 1 + (int)(next() % 5);
        const size_t size = (size_t)(rows * columns), codes = (size_t)((rows + 4) * columns);
        float *target = random_floats(size, 100.0f), *original = random_floats(size, 100.0f), *table = random_floats(64, 127.0f);
        float *changed = malloc(sizeof *changed * size);
        float *feedback = random_floats((size_t)(columns * columns), 0.1f), *error = malloc(sizeof *error * size);
        float *scale = random_floats((size_t)rows, 0.0f), *weight = random_floats((size_t)rows, 0.0f);
        for (int i = 0; i < rows; i++) scale[i] = weight[i] = 1.0f;
        uint8_t *code = malloc(codes), *expected = malloc(codes);
        for (int k = 0; k < count; k++) {
            bstack_use(names[k]);
            memcpy(changed, target, sizeof *changed * size);
            if (bstack_trellis_encode(changed, original, columns, rows, feedback, table, scale, weight, code, error)) exit(3);
            for (size_t i = 0; i < codes; i++)
                if (code[i] > 3) exit(4);
            if (!k) memcpy(expected, code, codes);
            if (memcmp(expected, code, codes)) {
                fprintf(stderr, "%s: the codes differ\n", names[k]);
                exit(1);
            }
        }
        free(target), free(original), free(table), free(feedback), free(error), free(scale), free(weight), free(code);
        free(changed), free(expected);
    }
}

static const struct bstack_matrix *trellis_matrix(int m, int n) {
    struct bstack_matrix *matrix = calloc(1, sizeof *matrix);
    matrix->rows = m, matrix->columns = n, matrix->count = 1, matrix->kind[0] = BSTACK_TRELLIS5, matrix->rank[0] = 2;
    matrix->block[0] = block((size_t)(m + 4) * (size_t)((n + 3) / 4), (size_t)m);
    return matrix;
}

/* A decoder of three layers, the second with all that is optional, the third of experts, in half precision: each instruction set, and
 * two texts at once, must give the same logits. */
static void compare_decoders(const char *const *names, int count, int heads, int head_width, int page, int tokens) {
    enum { WIDTH = 20, INNER = 28, KEY_HEADS = 2, WORDS = 33, PAGES = 2, TEXTS = 2, LAYERS = 3, EXPERTS = 3, EXPERT_INNER = 10 };
    const int queries = heads * head_width, keys = KEY_HEADS * head_width;
    const struct bstack_matrix *expert_gate[EXPERTS], *expert_down[EXPERTS];
    for (int e = 0; e < EXPERTS; e++) {
        expert_gate[e] = trellis_matrix(2 * EXPERT_INNER, WIDTH);
        expert_down[e] = trellis_matrix(WIDTH, EXPERT_INNER);
    }
    struct bstack_layer layers[] = {
        {
            .query = trellis_matrix(queries, WIDTH), .key = trellis_matrix(keys, WIDTH), .value = trellis_matrix(keys, WIDTH),
            .out = trellis_matrix(WIDTH, queries), .gate = trellis_matrix(INNER, WIDTH), .up = trellis_matrix(INNER, WIDTH),
            .down = trellis_matrix(WIDTH, INNER), .input_norm = random_floats(WIDTH, 1.0f), .post_norm = random_floats(WIDTH, 1.0f),
            .query_norm = random_floats((size_t)head_width, 1.0f), .key_norm = random_floats((size_t)head_width, 1.0f),
            .query_bias = random_floats((size_t)queries, 1.0f), .down_bias = random_floats(WIDTH, 1.0f), .rope = 1,
        },
        {
            .query = trellis_matrix(queries + 2 * keys, WIDTH), .out = trellis_matrix(WIDTH, queries),
            .gate = trellis_matrix(2 * INNER, WIDTH), .down = trellis_matrix(WIDTH, INNER),
            .attention_norm = random_floats(WIDTH, 1.0f), .feed_norm = random_floats(WIDTH, 1.0f), .window = 2, .rope = -1,
        },
        {
            .query = trellis_matrix(queries + 2 * keys, WIDTH), .out = trellis_matrix(WIDTH, queries),
            .router = random_floats(EXPERTS * WIDTH, 1.0f), .expert_gate = expert_gate, .expert_down = expert_down,
        },
    };
    const struct bstack_matrix *head[] = {trellis_matrix(WORDS - 8, WIDTH), trellis_matrix(8, WIDTH)};
    struct bstack_decoder decoder = {
        .width = WIDTH, .inner = INNER, .heads = heads, .key_heads = KEY_HEADS, .head_width = head_width, .layers = LAYERS,
        .head_parts = 2, .rotary = 4, .activation = BSTACK_GELU, .half = 1, .page = page, .epsilon = 1e-5f, .scale = 0.4f, .cap = 5.0f,
        .experts = EXPERTS, .chosen = 2, .expert_inner = EXPERT_INNER, .normalised = 1,
        .layer = layers, .final_norm = random_floats(WIDTH, 1.0f), .head = head,
    };
    float *scratch = malloc(sizeof(float) * bstack_decoder_scratch(&decoder, TEXTS));
    float *embedding = random_floats(TEXTS * WIDTH, 1.0f), *cosine = random_floats(2 * 4, 1.0f), *sine = random_floats(2 * 4, 1.0f);
    float x[TEXTS * WIDTH], logits[TEXTS * WORDS], expected[TEXTS * WORDS];
    for (int k = 0; k < count; k++) {
        void *place[TEXTS][2 * LAYERS * PAGES];
        struct bstack_text texts[TEXTS];
        for (int i = 0; i < TEXTS; i++) {
            for (int p = 0; p < 2 * LAYERS * PAGES; p++) place[i][p] = calloc((size_t)(keys * decoder.page), 2);
            texts[i] = (struct bstack_text){.pages = PAGES, .cosine = cosine, .sine = sine, .keys = place[i], .values = place[i] + LAYERS * PAGES};
        }
        bstack_use(names[k]);
        for (int t = 0; t < tokens; t++) {
            for (int i = 0; i < TEXTS; i++) texts[i].position = t;
            memcpy(x, embedding, sizeof x);
            if (!k) /* one after the other; the parts of the head are apart where there are two */
                for (int i = 0; i < TEXTS; i++) {
                    float own[WORDS];
                    if (bstack_decoder_step(&decoder, texts + i, 1, x + i * WIDTH, scratch, own)) exit(3);
                    memcpy(expected + i * (WORDS - 8), own, sizeof *own * (WORDS - 8));
                    memcpy(expected + TEXTS * (WORDS - 8) + i * 8, own + WORDS - 8, sizeof *own * 8);
                }
            memcpy(x, embedding, sizeof x);
            if (bstack_decoder_step(&decoder, texts, TEXTS, x, scratch, logits)) exit(3);
        }
        for (int i = 0; i < TEXTS * WORDS; i++)
            if (!isfinite(expected[i]) || logits[i] != expected[i]) {
                fprintf(stderr, "%s: the decoder's logits differ\n", names[k]);
                exit(1);
            }
        for (int i = 0; i < TEXTS * 2 * LAYERS * PAGES; i++) free(place[i / (2 * LAYERS * PAGES)][i % (2 * LAYERS * PAGES)]);
    }
}

/* Read tokens in a row through a layer, as many as are decoded rows' and as few as are not, and one after the other by steps. */
static void compare_reading(const char *const *names, int count) {
    enum { WIDTH = 20, INNER = 28, HEADS = 4, KEY_HEADS = 2, HEAD_WIDTH = 6, PAGE = 4, PAGES = 6, MANY = 21 };
    const int queries = HEADS * HEAD_WIDTH, keys = KEY_HEADS * HEAD_WIDTH;
    struct bstack_layer layer = {
        .query = trellis_matrix(queries, WIDTH), .key = trellis_matrix(keys, WIDTH), .value = trellis_matrix(keys, WIDTH),
        .out = trellis_matrix(WIDTH, queries), .gate = trellis_matrix(INNER, WIDTH), .up = trellis_matrix(INNER, WIDTH),
        .down = trellis_matrix(WIDTH, INNER), .input_norm = random_floats(WIDTH, 1.0f), .post_norm = random_floats(WIDTH, 1.0f),
        .window = 7,
    };
    struct bstack_decoder decoder = {
        .width = WIDTH, .inner = INNER, .heads = HEADS, .key_heads = KEY_HEADS, .head_width = HEAD_WIDTH, .layers = 1,
        .rotary = HEAD_WIDTH, .half = 1, .page = PAGE, .epsilon = 1e-5f, .scale = 0.4f, .layer = &layer,
        .final_norm = random_floats(WIDTH, 1.0f),
    };
    float *scratch = malloc(sizeof(float) * bstack_decoder_scratch(&decoder, MANY)), *unit = random_floats(WIDTH, 0.0f);
    float *embedding = random_floats(MANY * WIDTH, 1.0f), *angles = random_floats(MANY * HEAD_WIDTH, 1.0f), found[2][MANY * WIDTH];
    for (int j = 0; j < WIDTH; j++) unit[j] = 1.0f;
    decoder.final_norm = unit;
    for (int k = 0; k < count; k++)
        for (int few = 0; few < 2; few++) {
            bstack_use(names[k]);
            for (int way = 0; way < 2; way++) { /* by steps, then in a row: 21 at once, or 5, 8 and 8 */
                void *place[2 * PAGES];
                struct bstack_text texts[MANY];
                float x[MANY * WIDTH];
                for (int p = 0; p < 2 * PAGES; p++) place[p] = calloc((size_t)(keys * PAGE), 2);
                memcpy(x, embedding, sizeof x);
                for (int t = 0; t < MANY; t++)
                    texts[t] = (struct bstack_text){.position = t, .pages = PAGES, .cosine = angles + t * HEAD_WIDTH,
                                                    .sine = angles + t * HEAD_WIDTH, .keys = place, .values = place + PAGES};
                for (int t = 0, some; t < MANY; t += some) {
                    some = !way ? 1 : !few ? MANY : t ? 8 : 5;
                    if (way ? bstack_decoder_read(&decoder, 0, texts + t, some, x + t * WIDTH, scratch)
                            : bstack_decoder_step(&decoder, texts + t, 1, x + t * WIDTH, scratch, found[0]))
                        exit(3);
                }
                memcpy(found[way], x, sizeof x);
                for (int p = 0; p < 2 * PAGES; p++) free(place[p]);
            }
            float largest = 0.0f;
            for (int j = 0; j < MANY * WIDTH; j++) largest = fmaxf(largest, fabsf(found[0][j]));
            for (int j = 0; j < MANY * WIDTH; j++)
                if (!(fabsf(found[0][j] - found[1][j]) <= 1e-2f * largest)) {
                    fprintf(stderr, "%s: a prompt that is read differs from its steps\n", names[k]);
                    exit(1);
                }
        }
}

/* Products for many tokens, on arrays of exactly their size: with every instruction set near those for few. */
static void compare_many_tokens(const char *const *names, int count) {
    static const int shapes[][3] = {{1, 5, 1}, {37, 70, 13}, {70, 129, 6}}; /* rows, columns, tokens */
    for (int k = 0; k < count; k++)
        for (int i = 0; i < 3; i++) {
            const int m = shapes[i][0], n = shapes[i][1], t = shapes[i][2];
            bstack_use(names[k]);
            struct bstack_matrix *matrix = trellis_matrix(m, n);
            float *x = random_floats((size_t)(t * n), 1.0f), *w = malloc(sizeof *w * (size_t)(m * n));
            float *expected = malloc(sizeof(float) * (size_t)(t * m)), *y[2];
            for (int e = 0; e < 2; e++) y[e] = malloc(sizeof(float) * (size_t)(t * m));
            const struct bstack_matrix *one = matrix;
            bstack_decode_rows(matrix, 1u << BSTACK_TRELLIS5, 0, m, w);
            if (bstack_multiply(&one, 1, x, t, &expected)) exit(3);
            bstack_rotate(x, t, n);
            memset(y[1], 0, sizeof(float) * (size_t)(t * m));
            if (bstack_multiply_dense(w, (size_t)n, m, n, x, (size_t)n, t, y[0], (size_t)m)) exit(3);
            if (bstack_multiply_decoded(matrix, 1u << BSTACK_TRELLIS5, x, t, y[1], (size_t)m, 1)) exit(3);
            float largest = 0.0f;
            for (int j = 0; j < t * m; j++) largest = fmaxf(largest, fabsf(expected[j]));
            for (int j = 0; j < 2 * t * m; j++)
                if (!(fabsf(y[j % 2][j / 2] - expected[j / 2]) <= 1e-3f * largest)) {
                    fprintf(stderr, "%s: a product for many tokens differs\n", names[k]);
                    exit(1);
                }
            free(x), free(w), free(expected), free(y[0]), free(y[1]);
        }
}

int main(int argc, char **argv) {
    static const char *const all[] = {"portable", "neon", "avx2", "avx512bw", "avxvnni", "avx512", "amx"};
    const char *names[7];
    int count = 0;
    for (int k = 0; k < 7; k++)
        if (!bstack_offers(all[k])) names[count++] = all[k];
    if (argc > 1 && bstack_offers(argv[1])) return fprintf(stderr, "no %s kernels\n", argv[1]), 2;
    bstack_set_threads(2);
    compare_matrices(names, count);
    compare_encoders(names, count);
    compare_decoders(names, count, 4, 6, 2, 3);
    compare_decoders(names, count, 8, 80, 32, 37); /* whole registers, four heads with the same keys */
    compare_reading(names, count);
    compare_many_tokens(names, count);
    bstack_set_threads(1);
    bstack_rotate(NULL, 0, 1); /* ends the threads */
    puts("400 matrices agree");
    return 0;
}
