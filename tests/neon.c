/* Compares the products of the NEON kernels with those of the portable ones, bit for bit; test_neon.py builds and runs it. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bstack.h"

static uint32_t state = 1;
static uint32_t next(void) { return state = state * 1664525u + 1013904223u, state >> 8; }

static uint8_t *block(size_t codes, size_t halves) {
    uint8_t *bytes = malloc(codes + 2 * halves);
    for (size_t i = 0; i < codes; i++) bytes[i] = (uint8_t)next();
    for (size_t i = 0; i < halves; i++) { /* half precision, 2^-6 to 2^-2 in size */
        const uint16_t half = (uint16_t)((next() & 0x8000u) | (0x2400u + next() % 0x1000u));
        memcpy(bytes + codes + 2 * i, &half, 2);
    }
    return bytes;
}

int main(void) {
    if (bstack_offers("neon")) return fprintf(stderr, "no NEON kernels\n"), 2;
    for (int round = 0; round < 200; round++) {
        const int m = 1 + (int)(next() % 70), n = 1 + (int)(next() % 700), tokens = 1 + (int)(next() % 9);
        struct bstack_matrix matrix = {.rows = m, .columns = n, .count = 1 + (int)(next() % 3)};
        for (int level = 0; level < matrix.count; level++) {
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
            return fprintf(stderr, "round %d: %d x %d, %d tokens, %d blocks\n", round, m, n, tokens, matrix.count), 1;
        free(x), free(y[0]), free(y[1]);
    }
    puts("200 matrices agree");
    return 0;
}
