/* Products of digits with AVX-512: four of them added to a sum in one instruction. */
#include "avx512.h"

#include "feedback.h"

#ifdef BSTACK_X86
static void products(const int8_t *left, size_t step, int tiles, const int8_t *left_next, const uint8_t *right,
                     const uint8_t *right_next, int pieces, int32_t *sums) {
    (void)left_next, (void)right_next; /* it is in time for these sums */
    for (int t = 0; t < tiles; t++)
        for (int r = 0; r < RIGHT; r++) {
            __m512i sum[TALL], *at = (__m512i *)(sums + (t * RIGHT + r) * SUM);
            UNROLL
            for (int j = 0; j < TALL; j++) sum[j] = _mm512_load_si512(at + j);
            for (int p = 0; p < pieces; p++) {
                const int8_t *digits = left + ((size_t)t * step + (size_t)p) * TILE;
                const uint8_t *values = right + (size_t)(p * RIGHT + r) * TILE;
                for (int four = 0; four < TALL; four++) {
                    const __m512i value = _mm512_load_si512(values + four * WIDE);
                    UNROLL
                    for (int j = 0; j < TALL; j++) {
                        int32_t digit;
                        memcpy(&digit, digits + j * WIDE + four * 4, 4);
                        sum[j] = _mm512_dpbusd_epi32(sum[j], value, _mm512_set1_epi32(digit));
                    }
                }
            }
            UNROLL
            for (int j = 0; j < TALL; j++) _mm512_store_si512(at + j, sum[j]);
        }
}

void bstack_look_up_avx512(const uint8_t *codes, int rows, uint8_t *values) {
    const __m512i table = _mm512_load_si512(bstack_table5);
    for (int i = 0; i < rows; i += WIDE) {
        __m512i code[EARLIER5 + 1];
        UNROLL
        for (int k = 0; k <= EARLIER5; k++) code[k] = load(codes + i + k, rows - i);
        const __m512i own = _mm512_xor_si512(_mm512_xor_si512(code[4], code[2]), code[0]);
        const __m512i place = _mm512_or_si512(code[3], _mm512_or_si512(_mm512_slli_epi16(own, 2), _mm512_slli_epi16(code[1], 4)));
        _mm512_storeu_si512(values + i, _mm512_permutexvar_epi8(place, table));
    }
}

const struct feedback bstack_feedback_avx512 = {.products = products, .look_up = bstack_look_up_avx512};

END_OF_TARGET
#endif
