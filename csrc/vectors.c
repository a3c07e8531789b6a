/* Sums, multiples and the softmax of arrays of floats. */
#include "vectors.h"

EACH_CPU
float bstack_dot(const float *restrict a, const float *restrict b, int n) {
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
void bstack_add_scaled(float *restrict y, const float *restrict x, float factor, int n) {
    for (int j = 0; j < n; j++) y[j] += factor * x[j];
}

EACH_CPU
void bstack_scale(float *x, float factor, int n) {
    for (int j = 0; j < n; j++) x[j] *= factor;
}

EACH_CPU
float bstack_soften(float *restrict score, int n, float cap, float *most, float *sum) {
    float lane[LANES], total[LANES] = {0};
    int j = 0;
    if (cap > 0.0f)
        for (j = 0; j < n; j++) score[j] = cap * hyperbolic_tangent(score[j] / cap);
    for (int l = 0; l < LANES; l++) lane[l] = *most;
    for (j = 0; j + LANES <= n; j += LANES)
        for (int l = 0; l < LANES; l++) lane[l] = score[j + l] > lane[l] ? score[j + l] : lane[l];
    for (int l = 0; j + l < n; l++) lane[l] = score[j + l] > lane[l] ? score[j + l] : lane[l];
    for (int half = LANES / 2; half; half /= 2)
        for (int l = 0; l < half; l++) lane[l] = lane[l + half] > lane[l] ? lane[l + half] : lane[l];
    const float largest = lane[0], factor = exponential(*most - largest);
    for (j = 0; j < n; j++) score[j] = exponential(score[j] - largest);
    for (j = 0; j + LANES <= n; j += LANES)
        for (int l = 0; l < LANES; l++) total[l] += score[j + l];
    for (int l = 0; j + l < n; l++) total[l] += score[j + l];
    for (int half = LANES / 2; half; half /= 2)
        for (int l = 0; l < half; l++) total[l] += total[l + half];
    *most = largest;
    *sum = *sum * factor + total[0];
    return factor;
}
