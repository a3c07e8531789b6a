/* Restores a matrix from its blocks and its exact chunk: test_builds.py compares what another processor gives.
 *
 * Standard input, all u32 little-endian: rows, columns, blocks; kind, rank, length and bytes of each block; length and bytes of the
 * exact chunk; low bits and escaped weights that it has. Standard output: the bits of the matrix in single precision. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bstack.h"

static uint32_t word(void) {
    uint32_t value;
    if (fread(&value, sizeof value, 1, stdin) != 1) exit(2);
    return value;
}

static uint8_t *bytes(size_t length) {
    uint8_t *data = calloc(length + 4, 1);
    if (fread(data, 1, length, stdin) != length) exit(2);
    return data;
}

int main(void) {
    struct bstack_matrix matrix = {.rows = (int32_t)word(), 0};
    matrix.columns = (int32_t)word();
    matrix.count = (int32_t)word();
    for (int level = 0; level < matrix.count; level++) {
        matrix.kind[level] = (uint8_t)word();
        matrix.rank[level] = (uint8_t)word();
        matrix.block[level] = bytes(word());
    }
    const size_t weights = (size_t)matrix.rows * (size_t)matrix.columns;
    uint8_t *payload = bytes(word());
    const size_t low_bits = word(), escapes = word();
    uint32_t head[1 + BSTACK_CLASSES];
    memcpy(head, payload, sizeof head);
    struct bstack_exact state = {.columns = matrix.columns, .trailing = (int32_t)head[0], .all_escapes = escapes};
    state.profile = malloc(sizeof(float) * (size_t)matrix.columns);
    for (int j = 0; j < matrix.columns; j++) state.profile[j] = 1.0f;
    uint8_t *scales = payload + sizeof head, *at = scales + matrix.rows;
    for (int c = 0; c < BSTACK_CLASSES; c++) {
        state.symbol[c] = at;
        state.stop[c] = at += head[1 + c];
    }
    state.low = at;
    state.escape = at + (low_bits + 7) / 8;
    int64_t *index = malloc(sizeof *index * (size_t)matrix.rows);
    for (int i = 0; i < matrix.rows; i++) index[i] = i;
    float *predicted = malloc(sizeof *predicted * weights);
    uint32_t *out = malloc(sizeof *out * weights);
    bstack_lookup(&matrix, index, matrix.rows, predicted);
    if (bstack_exact_decode(&state, predicted, scales, matrix.rows, out)) return 1;
    return fwrite(out, sizeof *out, weights, stdout) != weights;
}
