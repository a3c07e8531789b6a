/* Arithmetic on arrays of floats that the parts of a decoder share. Sums run over sixteen lanes in a fixed order and the exponential
 * is one of additions and multiplications, so results do not depend on the instruction set.
 */
#ifndef BSTACK_VECTORS_H
#define BSTACK_VECTORS_H

#include "kernels.h"

enum { LANES = 16 };

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

/* Return the sum of a[j] b[j]. */
float bstack_dot(const float *restrict a, const float *restrict b, int n);
/* Add factor * x to y. */
void bstack_add_scaled(float *restrict y, const float *restrict x, float factor, int n);
void bstack_scale(float *x, float factor, int n);
/* Make weights of scores, relative to the largest so far, and add them to `sum`; return the factor for what was summed before. */
float bstack_soften(float *restrict score, int n, float cap, float *most, float *sum);

#endif
