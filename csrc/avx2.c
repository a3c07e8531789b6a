/* AVX2: 32 weights are looked up in 16 tables of 16 values, chosen by a tree of blends.
 *
 * Inputs are arranged so that the even and the odd of 32 codes each fill a register, as bytes do when taken from words.
 */
#include "avx2.h"

#ifdef BSTACK_X86
enum {
    WIDE = 32,
    FLUSH = 8 * GROUP, /* code bytes after which 32-bit lanes are emptied: 256 products of 255 and X_LIMIT fit */
};

static void arrange(int16_t *x, size_t groups) {
    for (size_t i = 0; i < 2 * groups; i++, x += WIDE) {
        int16_t even[WIDE / 2], odd[WIDE / 2];
        for (int j = 0; j < WIDE / 2; j++) {
            even[j] = x[2 * j];
            odd[j] = x[2 * j + 1];
        }
        memcpy(x, even, sizeof even);
        memcpy(x + WIDE / 2, odd, sizeof odd);
    }
}

/* Take the bits of a where the mask is set, of b elsewhere. */
INLINE __m256i select_bits(__m256i mask, __m256i a, __m256i b) {
    return _mm256_or_si256(_mm256_and_si256(mask, a), _mm256_andnot_si256(mask, b));
}

/* Look up the values of windows: table k holds those with the high half byte k, and blends choose the table bit by bit. A
 * blend reads the top bit of each byte, so the bits of the window are moved there. */
INLINE __m256i look_up(__m256i window) {
    const __m256i low = _mm256_and_si256(window, _mm256_set1_epi8(0x0F));
    const __m256i bit4 = _mm256_slli_epi16(window, 3), bit5 = _mm256_slli_epi16(window, 2);
    const __m256i bit6 = _mm256_slli_epi16(window, 1);
    __m256i eighth[2], quarter[2], half[2];
    UNROLL
    for (int k = 0; k < 16; k += 2) { /* depth first: few registers are needed at a time */
        const __m256i even = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *)(bstack_table + 16 * k)));
        const __m256i odd = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *)(bstack_table + 16 * k + 16)));
        eighth[k / 2 & 1] = _mm256_blendv_epi8(_mm256_shuffle_epi8(even, low), _mm256_shuffle_epi8(odd, low), bit4);
        if (k & 2) quarter[k / 4 & 1] = _mm256_blendv_epi8(eighth[0], eighth[1], bit5);
        if ((k & 6) == 6) half[k / 8] = _mm256_blendv_epi8(quarter[0], quarter[1], bit6);
    }
    return _mm256_blendv_epi8(half[0], half[1], window);
}

INLINE __m256i multiply_add(__m256i sum, __m256i value, const uint8_t *x) {
    const __m256i even = _mm256_and_si256(value, _mm256_set1_epi16(0xFF)), odd = _mm256_srli_epi16(value, 8);
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(even, _mm256_loadu_si256((const __m256i *)x)));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(odd, _mm256_loadu_si256((const __m256i *)(x + WIDE))));
}

INLINE int64_t sum_lanes(__m256i a) {
    const __m256i low = _mm256_cvtepi32_epi64(_mm256_castsi256_si128(a));
    const __m256i high = _mm256_cvtepi32_epi64(_mm256_extracti128_si256(a, 1));
    int64_t lane[4];
    _mm256_storeu_si256((__m256i *)lane, _mm256_add_epi64(low, high));
    return lane[0] + lane[1] + lane[2] + lane[3];
}

/* Add a register of code bytes of one row: 128 columns, 32 of each quarter. */
INLINE void trellis_step(const uint8_t *codes, size_t stride, const uint8_t *x, size_t step, int depth, __m256i *sum) {
    const __m256i crumbs = _mm256_set1_epi8(0x33), nibble = _mm256_set1_epi8(0x0F);
    __m256i row[EARLIER + 1], even[2], odd[2];
    UNROLL
    for (int e = 0; e <= EARLIER; e++) row[e] = _mm256_loadu_si256((const __m256i *)(codes + (size_t)e * stride));
    UNROLL
    for (int e = 0; e < 2; e++) { /* of two rows: codes of quarters 0 and 2, and of 1 and 3, the older row's in the higher bits */
        even[e] = select_bits(crumbs, row[2 * e + 1], _mm256_slli_epi16(row[2 * e], 2));
        odd[e] = select_bits(crumbs, _mm256_srli_epi16(row[2 * e + 1], 2), row[2 * e]);
    }
    const __m256i window[QUARTERS] = {
        select_bits(nibble, even[1], _mm256_slli_epi16(even[0], 4)),
        select_bits(nibble, odd[1], _mm256_slli_epi16(odd[0], 4)),
        select_bits(nibble, _mm256_srli_epi16(even[1], 4), even[0]),
        select_bits(nibble, _mm256_srli_epi16(odd[1], 4), odd[0]),
    };
    UNROLL
    for (int quarter = 0; quarter < QUARTERS; quarter++) {
        const __m256i value = look_up(window[quarter]);
        UNROLL
        for (int o = 0; o < depth; o++)
            sum[o] = multiply_add(sum[o], value, x + (size_t)o * step + (size_t)quarter * OPERAND);
    }
}

INLINE void trellis_row(const uint8_t *codes, size_t stride, int width, const uint8_t *x, size_t step, int depth,
                        int64_t *sums, int rows) {
    for (int start = 0; start < width; start += FLUSH) {
        const int stop = start + FLUSH < width ? start + FLUSH : width;
        __m256i sum[4];
        UNROLL
        for (int o = 0; o < depth; o++) sum[o] = _mm256_setzero_si256();
        int b = start;
        for (; b + WIDE <= stop; b += WIDE) trellis_step(codes + b, stride, inputs_of(x, b), step, depth, sum);
        if (b < stop) {
            uint8_t rest[(EARLIER + 1) * WIDE];
            copy_rest(rest, WIDE, codes + b, stride, stop - b);
            trellis_step(rest, WIDE, inputs_of(x, b), step, depth, sum);
        }
        UNROLL
        for (int o = 0; o < depth; o++) sums[(size_t)o * (size_t)rows] += sum_lanes(sum[o]);
    }
}

/* Add four sign bytes of one row: 32 columns. */
INLINE void sign_step(uint32_t bits, const uint8_t *x, size_t step, int depth, __m256i *sum) {
    const __m256i value = _mm256_and_si256(bytes_of_bits(bits), _mm256_set1_epi8(1));
    UNROLL
    for (int o = 0; o < depth; o++) sum[o] = multiply_add(sum[o], value, x + (size_t)o * step);
}

INLINE void sign_row(const uint8_t *bits, size_t stride, int width, const uint8_t *x, size_t step, int depth, int64_t *sums,
                     int rows) {
    (void)stride;
    __m256i sum[4];
    UNROLL
    for (int o = 0; o < depth; o++) sum[o] = _mm256_setzero_si256();
    int b = 0;
    uint32_t word;
    for (; b + 4 <= width; b += 4, x += OPERAND / 2) {
        memcpy(&word, bits + b, 4);
        sign_step(word, x, step, depth, sum);
    }
    if (b < width) {
        word = 0;
        memcpy(&word, bits + b, (size_t)(width - b));
        sign_step(word, x, step, depth, sum);
    }
    UNROLL
    for (int o = 0; o < depth; o++) sums[(size_t)o * (size_t)rows] += sum_lanes(sum[o]);
}

ROW_BY_ROW(trellis)
ROW_BY_ROW(sign)

const struct kernels bstack_avx2 = {
    .name = "avx2",
    .arrange = arrange,
    .trellis = trellis,
    .sign = sign,
    .spqr = &bstack_spqr_avx2,
};

END_OF_TARGET
#endif
