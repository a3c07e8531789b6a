/* The search of the encoder with AVX-512: 16 states a register, which of two is cheaper as bits of masks. */
#include "avx512.h"

#include "encode.h"

#ifdef BSTACK_X86
enum { MASKS = 3, BACK = 16 * MASKS }; /* of 16 states: is code 1 below 0, 3 below 2, the better of these below that of those */

/* Lanes c1 + 4 c0 -> c0 + 4 c1, and back. */
INLINE __m512 turn(__m512 a) {
    return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), a);
}

/* State c0 + 4 c1 + 16 c2 + 64 c3 is in register c2 + 4 c3. While costs are compared, its lane is c1 + 4 c0, so that the
 * costs before are four neighbours read four times over, and the 16 values of one c3 are used as they are or with their
 * quarters swapped: y = c0 ^ c2 ^ c4. */
INLINE void advance(float x, float weight, const __m512 *table, const float *before, float *after, uint16_t *back) {
    UNROLL
    for (int c3 = 0; c3 < CODES; c3++) {
        const __m512 d = _mm512_sub_ps(_mm512_set1_ps(x), table[c3]);
        __m512 cost[CODES];
        cost[0] = _mm512_mul_ps(_mm512_set1_ps(weight), _mm512_mul_ps(d, d));
        cost[1] = _mm512_shuffle_f32x4(cost[0], cost[0], 0xB1);
        cost[2] = _mm512_shuffle_f32x4(cost[0], cost[0], 0x4E);
        cost[3] = _mm512_shuffle_f32x4(cost[0], cost[0], 0x1B);
        UNROLL
        for (int c2 = 0; c2 < CODES; c2++) {
            __m512 sum[CODES];
            UNROLL
            for (int o = 0; o < CODES; o++) {
                const __m128 four = _mm_load_ps(before + 4 * c2 + 16 * c3 + 64 * o);
                sum[o] = _mm512_add_ps(_mm512_broadcast_f32x4(four), cost[c2 ^ o]);
            }
            const int r = c2 + 4 * c3;
            const __mmask16 one = _mm512_cmp_ps_mask(sum[1], sum[0], _CMP_LT_OQ);
            const __mmask16 three = _mm512_cmp_ps_mask(sum[3], sum[2], _CMP_LT_OQ);
            const __m512 low = _mm512_min_ps(sum[1], sum[0]), high = _mm512_min_ps(sum[3], sum[2]);
            const __mmask16 upper = _mm512_cmp_ps_mask(high, low, _CMP_LT_OQ);
            _mm512_store_ps(after + 16 * r, turn(_mm512_min_ps(high, low)));
            back[r] = one, back[16 + r] = three, back[32 + r] = upper;
        }
    }
}

static int search(const float *x, const float *weight, int rows, const float *table, uint8_t *back) {
    ALIGNED float costs[2][STATES] = {{0}};
    __m512 values[CODES];
    for (int c3 = 0; c3 < CODES; c3++) values[c3] = _mm512_loadu_ps(table + 16 * c3);
    for (int i = 0; i < rows; i++) {
        float *after = costs[(i + 1) & 1];
        advance(x[i], weight[i], values, costs[i & 1], after, (uint16_t *)back + (size_t)i * BACK);
        if ((i & 15) == 15) {
            const __m512 zero = _mm512_set1_ps(after[0]);
            for (int s = 0; s < STATES; s += 16) _mm512_store_ps(after + s, _mm512_sub_ps(_mm512_load_ps(after + s), zero));
        }
    }
    return cheapest(costs[rows & 1]);
}

static int oldest(const uint8_t *back, int row, int state) {
    const uint16_t *at = (const uint16_t *)back + (size_t)row * BACK + (state >> 4);
    const int lane = (state >> 2 & 3) + 4 * (state & 3), upper = at[32] >> lane & 1;
    return 2 * upper + (at[16 * upper] >> lane & 1);
}

const struct encoder bstack_encoder_avx512 = {.search = search, .oldest = oldest};

END_OF_TARGET
#endif
