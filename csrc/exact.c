/* Code what the blocks of a matrix lack to the original (exact chunks of SPEC.md): class of each weight from its prediction,
 * the scale of its row and the profile of its column, all in single precision in a fixed order. */
#include "kernels.h"

enum { RUN = 256, ESCAPE = -128 }; /* columns taken together, in loops that vectorise; the symbol of a weight that is stored whole */

struct run {
    uint8_t class[RUN];
    int32_t floor[RUN], predicted[RUN]; /* f and M(p) */
};

/* Without calls, so that loops around it vectorise. */
INLINE uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

EACH_CPU static void classify(struct run *restrict run, const float *restrict p, const float *restrict profile, float scale, int count,
                              int t) {
    const uint32_t half = t ? 1u << (t - 1) : 0u;
    for (int j = 0; j < count; j++) {
        const uint32_t v = bits_of(scale * profile[j]), x = bits_of(p[j]);
        const uint32_t b = (x & 0x7fffffffu) > 0x7f800000u ? 0u : x; /* processors choose different signs for a NaN */
        const int32_t low = (int32_t)(v >> 23) - 4, own = (int32_t)(b >> 23 & 255u);
        const int32_t f = (low << (23 - t)) - 1, a = (int32_t)(((b & 0x7fffffffu) + half) >> t);
        const int32_t at = (int32_t)(v >> 22) - 2 * ((own > low ? own : low) + t - 23) + 8, m = (a > f ? a : f) - f;
        run->class[j] = (uint8_t)(at < 0 ? 0 : at > BSTACK_CLASSES - 1 ? BSTACK_CLASSES - 1 : at);
        run->floor[j] = f;
        run->predicted[j] = b >> 31 ? -m : m;
    }
}

EACH_CPU static void adapt(float *restrict profile, const float *restrict p, const uint32_t *restrict w, float inverse, int count) {
    for (int j = 0; j < count; j++) {
        float value;
        memcpy(&value, w + j, 4);
        float y = __builtin_fabsf(value - p[j]) * inverse;
        y = y < 16.0f ? y : 16.0f; /* also where it is NaN */
        y = y > 0x1p-12f ? y : 0x1p-12f;
        profile[j] += (y - profile[j]) * 0x1p-6f;
    }
}

static float scale_of(uint8_t code) {
    const uint32_t bits = (134u + code) << 22;
    float scale;
    memcpy(&scale, &bits, 4);
    return scale;
}

static void set_shifts(int *shift, int t) {
    for (int c = 0; c < BSTACK_CLASSES; c++) {
        const int k = c / 2 - 5;
        shift[c] = k < 0 ? 0 : k > 22 - t ? 22 - t : k;
    }
}

int bstack_exact_decode(struct bstack_exact *state, const float *p, const uint8_t *scales, int rows, uint32_t *out) {
    const int n = state->columns, t = state->trailing;
    int shift[BSTACK_CLASSES];
    set_shifts(shift, t);
    struct run run;
    for (int i = 0; i < rows; i++, p += n, out += n) {
        const float scale = scale_of(scales[i]);
        for (int start = 0; start < n; start += RUN) {
            const int count = n - start < RUN ? n - start : RUN;
            classify(&run, p + start, state->profile + start, scale, count, t);
            for (int j = 0; j < count; j++) {
                const int c = run.class[j], k = shift[c];
                if (state->symbol[c] == state->stop[c]) return 1;
                const int8_t symbol = (int8_t)*state->symbol[c]++;
                if (symbol == ESCAPE) {
                    uint32_t w = 0;
                    for (int b = 0; b < 4; b++) w |= (uint32_t)state->escape[(size_t)b * state->all_escapes + state->escapes] << 8 * b;
                    state->escapes++;
                    out[start + j] = w;
                    continue;
                }
                uint32_t low; /* 4 bytes hold 25 bits from any bit of the first, and k is at most 22 */
                memcpy(&low, state->low + state->bits / 8, 4);
                low = low >> state->bits % 8 & ((1u << k) - 1u);
                state->bits += (size_t)k;
                const int32_t m = (int32_t)((uint32_t)run.predicted[j] + ((uint32_t)symbol << k) + low);
                const uint32_t sign = (uint32_t)m & 0x80000000u, a = sign ? 0u - (uint32_t)m : (uint32_t)m;
                out[start + j] = sign | ((a + (uint32_t)run.floor[j]) << t & 0x7fffffffu);
            }
            adapt(state->profile + start, p + start, out + start, 1.0f / scale, count);
        }
    }
    return 0;
}

void bstack_exact_encode(struct bstack_exact *state, const float *p, const uint8_t *scales, int rows, const uint32_t *w) {
    const int n = state->columns, t = state->trailing;
    int shift[BSTACK_CLASSES];
    set_shifts(shift, t);
    struct run run;
    for (int i = 0; i < rows; i++, p += n, w += n) {
        const float scale = scale_of(scales[i]);
        for (int start = 0; start < n; start += RUN) {
            const int count = n - start < RUN ? n - start : RUN;
            classify(&run, p + start, state->profile + start, scale, count, t);
            for (int j = 0; j < count; j++) {
                const int c = run.class[j], k = shift[c];
                const uint32_t bits = w[start + j];
                const int32_t a = (int32_t)((bits & 0x7fffffffu) >> t) - run.floor[j];
                const int32_t d = (int32_t)((uint32_t)(bits >> 31 ? -a : a) - (uint32_t)run.predicted[j]), symbol = d >> k;
                const int escaped = a <= 0 || symbol <= ESCAPE || symbol > 127;
                if (!state->low) { /* only count */
                    state->count[c]++;
                } else {
                    *state->symbol[c]++ = (uint8_t)(escaped ? ESCAPE : symbol);
                    if (escaped)
                        for (int b = 0; b < 4; b++)
                            state->escape[(size_t)b * state->all_escapes + state->escapes] = (uint8_t)(bits >> 8 * b);
                    else {
                        uint32_t low;
                        memcpy(&low, state->low + state->bits / 8, 4);
                        low |= ((uint32_t)d & ((1u << k) - 1u)) << state->bits % 8;
                        memcpy(state->low + state->bits / 8, &low, 4);
                    }
                }
                state->escapes += (size_t)escaped;
                state->bits += escaped ? 0 : (size_t)k;
            }
            adapt(state->profile + start, p + start, w + start, 1.0f / scale, count);
        }
    }
}
