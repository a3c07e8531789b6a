/* Rotate and quantise inputs, in single precision in a fixed order. */
#include "kernels.h"

#include <math.h>

enum { TOGETHER = 16 }; /* tokens rotated by one thread at a time */

/* Sign bits of the first inputs; later ones are computed. Written when the library is loaded, before any thread reads it. */
enum { CACHED = 16384 };
static uint32_t cached_signs[CACHED];

static uint32_t sign_bit(uint64_t j) {
    uint64_t z = j + 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    z ^= z >> 31;
    return (uint32_t)(z >> 32) & 0x80000000u;
}

__attribute__((constructor)) static void cache_signs(void) {
    for (int j = 0; j < CACHED; j++) cached_signs[j] = sign_bit((uint64_t)j);
}

EACH_CPU static void flip_signs(float *x, int columns) {
    const int ready = columns < CACHED ? columns : CACHED;
    uint32_t bits;
    for (int j = 0; j < ready; j++) {
        memcpy(&bits, x + j, 4);
        bits ^= cached_signs[j];
        memcpy(x + j, &bits, 4);
    }
    for (int j = ready; j < columns; j++) {
        memcpy(&bits, x + j, 4);
        bits ^= sign_bit((uint64_t)j);
        memcpy(x + j, &bits, 4);
    }
}

/* Transform blocks of `size`, a power of two, by Hadamard, then divide by its square root. */
EACH_CPU static void hadamard(float *x, int columns, int size) {
    for (int half = 1; half < size; half *= 2) {
        if (half == 1 && size >= 4) { /* two steps at once: loops this short are not vectorised */
            for (int j = 0; j < columns; j += 4) {
                const float a = x[j] + x[j + 1], b = x[j] - x[j + 1], c = x[j + 2] + x[j + 3], d = x[j + 2] - x[j + 3];
                x[j] = a + c;
                x[j + 1] = b + d;
                x[j + 2] = a - c;
                x[j + 3] = b - d;
            }
            half = 2;
            continue;
        }
        for (int start = 0; start < columns; start += 2 * half) {
            float *restrict low = x + start, *restrict high = x + start + half;
            for (int j = 0; j < half; j++) {
                const float a = low[j], b = high[j];
                low[j] = a + b;
                high[j] = a - b;
            }
        }
    }
    const float scale = (float)(1.0 / sqrt((double)size));
    for (int j = 0; j < columns; j++) x[j] *= scale;
}

struct rows {
    float *x;
    int tokens, columns;
};

static void rotate_some(void *argument, int part) {
    const struct rows *rows = argument;
    const int start = part * TOGETHER, stop = start + TOGETHER < rows->tokens ? start + TOGETHER : rows->tokens;
    float *x = rows->x + (size_t)start * (size_t)rows->columns;
    for (int t = start; t < stop; t++, x += rows->columns) {
        flip_signs(x, rows->columns);
        hadamard(x, rows->columns, rows->columns & -rows->columns);
    }
}

void bstack_rotate(float *x, int tokens, int columns) {
    struct rows rows = {x, tokens, columns};
    bstack_parallel(rotate_some, &rows, (tokens + TOGETHER - 1) / TOGETHER);
}

void bstack_unrotate(float *x, int tokens, int columns) {
    for (int t = 0; t < tokens; t++, x += columns) {
        hadamard(x, columns, columns & -columns);
        flip_signs(x, columns);
    }
}

EACH_CPU float bstack_quantise(const float *x, int columns, int limit, int16_t *code) {
    /* Bits of absolute values have the order of the values, infinities and NaN last; a maximum of integers vectorises. */
    uint32_t top = 0;
    for (int j = 0; j < columns; j++) {
        uint32_t bits;
        memcpy(&bits, x + j, 4);
        bits &= 0x7fffffffu;
        top = bits > top ? bits : top;
    }
    float largest;
    memcpy(&largest, &top, 4);
    if (top >= 0x7f800000u || largest < 1e-30f) {
        memset(code, 0, sizeof *code * (size_t)columns);
        return top >= 0x7f800000u ? NAN : 0.0f;
    }
    const float inverse = (float)limit / largest, round = 0x1.8p23f; /* adding it rounds to an integer */
    for (int j = 0; j < columns; j++) code[j] = (int16_t)(int32_t)((x[j] * inverse + round) - round);
    return largest / (float)limit;
}
