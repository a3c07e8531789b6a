/* SpQR with AVX2: a lane is a row, eight rows at a time. */
#include "avx2.h"

#ifdef BSTACK_X86
enum { ROWS = 8 };
#include "spqr_rows.h"

INLINE void unpack(const uint8_t *subtile, int bits, int part, codes *code) {
    const uint8_t *at = subtile + 32 * part;
    if (bits == 4) {
        const __m256i nibble = _mm256_set1_epi8(0x0F);
        UNROLL
        for (int h = 0; h < 2; h++) {
            const __m256i both = _mm256_loadu_si256((const __m256i *)(at + 64 * h));
            code[2 * h] = (codes)_mm256_and_si256(both, nibble);
            code[2 * h + 1] = (codes)_mm256_and_si256(_mm256_srli_epi16(both, 4), nibble);
        }
    } else {
        const __m256i all = _mm256_loadu_si256((const __m256i *)at);
        UNROLL
        for (int j = 0; j < QUADS; j++) {
            const __m256i low = _mm256_and_si256(_mm256_srli_epi16(all, 2 * j), _mm256_set1_epi8(3));
            const __m256i third = bytes_of_bits(load_32(subtile + 64 + 8 * j + 4 * part));
            code[j] = (codes)_mm256_or_si256(low, _mm256_and_si256(third, _mm256_set1_epi8(4)));
        }
    }
}

INLINE __m256i everywhere(const uint8_t *at) { return _mm256_set1_epi32((int)load_32(at)); }

/* Four products of a code and a byte, and two of them in a 16-bit lane, stay below 2^15. */
INLINE words product_of(const codes *code, const uint8_t *planes) {
    __m256i high = _mm256_setzero_si256(), low = high;
    UNROLL
    for (int j = 0; j < QUADS; j++) {
        high = _mm256_add_epi16(high, _mm256_maddubs_epi16((__m256i)code[j], everywhere(planes + 4 * j)));
        low = _mm256_add_epi16(low, _mm256_maddubs_epi16((__m256i)code[j], everywhere(planes + TILE + 4 * j)));
    }
    return (words)_mm256_madd_epi16(high, _mm256_set1_epi16(256)) + (words)_mm256_madd_epi16(low, _mm256_set1_epi16(1));
}

/* Convert four halves to single precision; see half_to_float. */
INLINE __m128 from_halves(__m128i half) {
    const __m128i wide = _mm_cvtepu16_epi32(half), rest = _mm_and_si128(wide, _mm_set1_epi32(0x7FFF));
    const __m128 value = _mm_mul_ps(_mm_castsi128_ps(_mm_slli_epi32(rest, 13)), _mm_set1_ps(0x1p112f));
    const __m128i huge = _mm_and_si128(_mm_cmpgt_epi32(rest, _mm_set1_epi32(0x7BFF)), _mm_set1_epi32(0x7F800000));
    const __m128i sign = _mm_slli_epi32(_mm_and_si128(wide, _mm_set1_epi32(0x8000)), 16);
    return _mm_or_ps(value, _mm_castsi128_ps(_mm_or_si128(huge, sign)));
}

/* Compute start + slope times the 3-bit fields of eight rows. */
INLINE floats statistic(const uint8_t *at, __m128 start, __m128 slope) {
    const __m256i shift = _mm256_setr_epi32(0, 3, 6, 9, 12, 15, 18, 21), seven = _mm256_set1_epi32(7);
    const __m256i field = _mm256_and_si256(_mm256_srlv_epi32(everywhere(at), shift), seven);
    return _mm256_broadcastss_ps(start) + _mm256_broadcastss_ps(slope) * _mm256_cvtepi32_ps(field);
}

INLINE void statistics(const uint8_t *at, int part, floats *scale, floats *zero) {
    const __m128 s0 = from_halves(_mm_loadl_epi64((const __m128i *)(at + 12))), s1 = _mm_movehdup_ps(s0);
    const __m128 z0 = _mm_movehl_ps(s0, s0), z1 = _mm_movehl_ps(s1, s1);
    *scale = statistic(at + 3 * part, s0, s1);
    *zero = statistic(at + 6 + 3 * part, z0, z1);
}

INLINE floats to_floats(words numbers) { return _mm256_cvtepi32_ps((__m256i)numbers); }

INLINE void add_products(const uint8_t *value, const int16_t *given, floats *lanes) {
    UNROLL
    for (int half = 0; half < 2; half++) {
        const __m128i bits = _mm_loadu_si128((const __m128i *)value + half);
        const __m256 factor = _mm256_set_m128(from_halves(_mm_srli_si128(bits, 8)), from_halves(bits));
        const __m256i x = _mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i *)given + half));
        lanes[half] += factor * _mm256_cvtepi32_ps(x);
    }
}

INLINE float sum_lanes(const floats *lanes) {
    const __m256 eight = lanes[0] + lanes[1];
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

const struct spqr_kernels bstack_spqr_avx2 = {dense, outliers};

END_OF_TARGET
#endif
