/* SpQR with AVX2: a lane is a row, eight rows at a time. */
#include "avx2.h"
#include "spqr.h"

#ifdef BSTACK_X86
enum {
    QUADS = 4, /* inputs of a subtile, four at a time */
    EIGHT = 8, /* rows of a register */
};

/* The codes of four inputs after another of 8 rows; the codes of the first stand at `subtile`. */
INLINE void unpack(const uint8_t *subtile, int bits, int upper, __m256i *code) {
    const uint8_t *at = subtile + 32 * upper;
    if (bits == 4) {
        const __m256i nibble = _mm256_set1_epi8(0x0F);
        UNROLL
        for (int h = 0; h < 2; h++) {
            const __m256i both = _mm256_loadu_si256((const __m256i *)(at + 64 * h));
            code[2 * h] = _mm256_and_si256(both, nibble);
            code[2 * h + 1] = _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble);
        }
    } else {
        const __m256i all = _mm256_loadu_si256((const __m256i *)at);
        UNROLL
        for (int j = 0; j < QUADS; j++) {
            const __m256i low = _mm256_and_si256(_mm256_srli_epi16(all, 2 * j), _mm256_set1_epi8(3));
            const __m256i third = bytes_of_bits(load_32(subtile + 64 + 8 * j + 4 * upper));
            code[j] = _mm256_or_si256(low, _mm256_and_si256(third, _mm256_set1_epi8(4)));
        }
    }
}

/* Four halves to single precision; see half_to_float. */
INLINE __m128 from_halves(__m128i half) {
    const __m128i wide = _mm_cvtepu16_epi32(half), rest = _mm_and_si128(wide, _mm_set1_epi32(0x7FFF));
    const __m128 value = _mm_mul_ps(_mm_castsi128_ps(_mm_slli_epi32(rest, 13)), _mm_set1_ps(0x1p112f));
    const __m128i huge = _mm_and_si128(_mm_cmpgt_epi32(rest, _mm_set1_epi32(0x7BFF)), _mm_set1_epi32(0x7F800000));
    const __m128i sign = _mm_slli_epi32(_mm_and_si128(wide, _mm_set1_epi32(0x8000)), 16);
    return _mm_or_ps(value, _mm_castsi128_ps(_mm_or_si128(huge, sign)));
}

/* start + slope times the 3-bit fields of eight rows. */
INLINE __m256 statistic(const uint8_t *at, __m128 start, __m128 slope) {
    const __m256i shift = _mm256_setr_epi32(0, 3, 6, 9, 12, 15, 18, 21), seven = _mm256_set1_epi32(7);
    const __m256i field = _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32((int)load_32(at)), shift), seven);
    const __m256 step = _mm256_mul_ps(_mm256_broadcastss_ps(slope), _mm256_cvtepi32_ps(field));
    return _mm256_add_ps(_mm256_broadcastss_ps(start), step);
}

INLINE __m256i everywhere(const uint8_t *at) { return _mm256_set1_epi32((int)load_32(at)); }

/* Eight rows of a row tile. Four products of a code and a byte, and two of them in a 16-bit lane, stay below 2^15. */
INLINE void half_tile(const struct dense *dense, int bits, int upper, const uint8_t *tile, const struct ordered *x, int first,
                      int deep, float *out) {
    const uint8_t *planes = x->planes + (size_t)first * x->step;
    const float *sums = x->sums + (size_t)first * (size_t)dense->groups;
    const __m256i ones = _mm256_set1_epi16(1), left = _mm256_set1_epi16(256);
    __m256 total[2];
    UNROLL
    for (int t = 0; t < deep; t++) total[t] = _mm256_setzero_ps();
    for (int g = 0; g < dense->groups; g++, sums++) {
        __m256i product[2];
        UNROLL
        for (int t = 0; t < deep; t++) product[t] = _mm256_setzero_si256();
        for (int s = 0; s < dense->subtiles; s++, tile += bits * 32, planes += PLANES) {
            __m256i code[QUADS];
            unpack(tile, bits, upper, code);
            UNROLL
            for (int t = 0; t < deep; t++) {
                __m256i high = _mm256_setzero_si256(), low = high;
                UNROLL
                for (int j = 0; j < QUADS; j++) {
                    const uint8_t *at = planes + (size_t)t * x->step + 4 * j;
                    high = _mm256_add_epi16(high, _mm256_maddubs_epi16(code[j], everywhere(at)));
                    low = _mm256_add_epi16(low, _mm256_maddubs_epi16(code[j], everywhere(at + TILE)));
                }
                const __m256i both = _mm256_add_epi32(_mm256_madd_epi16(high, left), _mm256_madd_epi16(low, ones));
                product[t] = _mm256_add_epi32(product[t], both);
            }
        }
        const __m128 s0 = from_halves(_mm_loadl_epi64((const __m128i *)(tile + 12))), s1 = _mm_movehdup_ps(s0);
        const __m128 z0 = _mm_movehl_ps(s0, s0), z1 = _mm_movehl_ps(s1, s1);
        const __m256 scale = statistic(tile + 3 * upper, s0, s1), zero = statistic(tile + 6 + 3 * upper, z0, z1);
        tile += STATISTICS;
        UNROLL
        for (int t = 0; t < deep; t++) {
            const __m256 sum = _mm256_set1_ps(sums[t * dense->groups]);
            const __m256 centred = _mm256_sub_ps(_mm256_cvtepi32_ps(product[t]), _mm256_mul_ps(zero, sum));
            total[t] = _mm256_add_ps(total[t], _mm256_mul_ps(scale, centred));
        }
    }
    UNROLL
    for (int t = 0; t < deep; t++) {
        float *to = out + (first + t) * DIRECT_ROWS + upper * EIGHT;
        _mm256_storeu_ps(to, _mm256_add_ps(_mm256_loadu_ps(to), total[t]));
    }
}

INLINE void row_tile(const struct dense *dense, int bits, const uint8_t *tiles, const struct ordered *x, int tokens, float *out) {
    for (int upper = 0; upper < 2; upper++) {
        int t = 0;
        for (; t + 2 <= tokens; t += 2) half_tile(dense, bits, upper, tiles, x, t, 2, out);
        for (; t < tokens; t++) half_tile(dense, bits, upper, tiles, x, t, 1, out);
    }
}

static void dense(const struct dense *dense, const uint8_t *tiles, int tall, const struct ordered *x, int tokens, float *out) {
    for (; tall; tall--, tiles += (size_t)dense->groups * dense->tile_bytes, out += TILE)
        if (dense->bits == 4)
            row_tile(dense, 4, tiles, x, tokens, out);
        else
            row_tile(dense, 3, tiles, x, tokens, out);
}

/* Add the products of 16 outliers to their lanes. */
INLINE void add_products(const uint8_t *value, const int16_t *given, __m256 *lanes) {
    UNROLL
    for (int half = 0; half < 2; half++) {
        const __m128i bits = _mm_loadu_si128((const __m128i *)value + half);
        const __m256 factor = _mm256_set_m128(from_halves(_mm_srli_si128(bits, 8)), from_halves(bits));
        const __m256i x = _mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i *)given + half));
        lanes[half] = _mm256_add_ps(lanes[half], _mm256_mul_ps(factor, _mm256_cvtepi32_ps(x)));
    }
}

static void outliers(const uint8_t *pointer, int rows, const uint8_t *value, const int16_t *given, float *out) {
    for (int i = 0; i < rows; i++, pointer += 4) {
        const size_t count = load_32(pointer + 4) - load_32(pointer);
        __m256 lanes[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
        size_t k = 0;
        for (; k + LANES <= count; k += LANES) add_products(value + 2 * k, given + k, lanes);
        if (k < count) {
            uint8_t last[2 * LANES] = {0}; /* what is missing adds zeros */
            memcpy(last, value + 2 * k, 2 * (count - k));
            add_products(last, given + k, lanes);
        }
        const __m256 eight = _mm256_add_ps(lanes[0], lanes[1]);
        const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
        const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        out[i] += _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
        value += 2 * count;
        given += count;
    }
}

const struct spqr_kernels bstack_spqr_avx2 = {dense, outliers};

END_OF_TARGET
#endif
