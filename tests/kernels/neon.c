/* Compares the products of the NEON kernels with those of the portable ones, bit for bit; test_neon.py builds and runs it. */
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
        matrix->kind[count] = BSTACK_TRELLIS, matrix->rank[count] = 2;
        matrix->block[count++] = block((size_t)(m + 3) * (size_t)((n + 3) / 4), (size_t)m);
    }
    matrix->count = count;
}

int main(void) {
    if (bstack_offers("neon")) return fprintf(stderr, "no NEON kernels\n"), 2;
    for (int round = 0; round < 400; round++) {
        const int m = 1 + (int)(next() % 70), n = 1 + (int)(next() % 700), tokens = 1 + (int)(next() % 9);
        struct bstack_matrix matrix = {.rows = m, .columns = n, .count = 1 + (int)(next() % 3)};
        if (round % 2) fill_spqr(&matrix);
        for (int level = 0; round % 2 == 0 && level < matrix.count; level++) {
            const int rank = next() % 2 ? 1 + (int)(next() % 16) : 0;
            matrix.kind[level] = rank ? BSTACK_SIGN : BSTACK_TRELLIS;
            matrix.rank[level] = (uint8_t)(rank ? rank : 2);
            matrix.block[level] = rank ? block((size_t)m * (size_t)((n + 7) / 8), (size_t)rank * (size_t)(m + n))
                                       : block((size_t)(m + 3) * (size_t)((n + 3) / 4), (size_t)m);
        }
        float *x = malloc(sizeof *x * (size_t)(tokens * n)), *y[2];
        for (int i = 0; i < tokens * n; i++) x[i] = ((float)(int)next() - 8388608.0f) / 1048576.0f;
        const char *names[2] = {"portable", "neon"};
        const struct bstack_matrix *matrices[1] = {&matrix};
        for (int k = 0; k < 2; k++) {
            y[k] = malloc(sizeof(float) * (size_t)(tokens * m));
            bstack_use(names[k]);
            if (bstack_multiply(matrices, 1, x, tokens, &y[k])) return 3;
        }
        if (memcmp(y[0], y[1], sizeof(float) * (size_t)(tokens * m)))
            return fprintf(stderr, "round %d: %d x %d, %d tokens, %d blocks of kind %d first\n", round, m, n, tokens,
                           matrix.count, matrix.kind[0]), 1;
        free(x), free(y[0]), free(y[1]);
    }
    puts("400 matrices agree");
    return 0;
}
