/* SpQR with AVX-512, VBMI and VNNI: a lane is a row, a dot product of bytes takes four inputs of each of the 16 rows. */
#include "avx512.h"
#include "spqr.h"

#ifdef BSTACK_X86
enum {
    FETCHED = 3072, /* bytes that the prefetch is ahead of the sums */
};

/* Unpack the codes of 16 rows, four inputs to a register. */
INLINE void unpack(const uint8_t *subtile, int bits, __m512i *code) {
    if (bits == 4) {
        const __m512i nibble = _mm512_set1_epi8(0x0F);
        UNROLL
        for (int h = 0; h < 2; h++) {
            __m512i both = _mm512_loadu_si512(subtile + 64 * h);
            KEEP(both);
            code[2 * h] = _mm512_and_si512(both, nibble);
            code[2 * h + 1] = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
        }
    } else {
        const __m512i crumb = _mm512_set1_epi8(3), four = _mm512_set1_epi8(4);
        __m512i all = _mm512_loadu_si512(subtile);
        KEEP(all);
        UNROLL
        for (int j = 0; j < QUADS; j++) {
            const __m512i low = _mm512_and_si512(j ? _mm512_srli_epi16(all, 2 * (unsigned)j) : all, crumb);
            uint64_t third;
            memcpy(&third, subtile + 64 + 8 * j, 8);
            code[j] = _mm512_mask_add_epi8(low, _cvtu64_mask64(third), low, four);
        }
    }
}

/* Copy a word of memory to each lane. */
INLINE __m512i everywhere(const uint8_t *at) { return _mm512_set1_epi32((int)load_32(at)); }

INLINE __m512i fields(const uint8_t *at) {
    uint64_t word;
    memcpy(&word, at, 8);
    /* Byte 4 r of the result: the eight bits of the word from bit 3 r on. */
    const __m512i from = _mm512_set_epi64(0x2D0000002A, 0x2700000024, 0x210000001E, 0x1B00000018, //
                                          0x1500000012, 0x0F0000000C, 0x0900000006, 0x0300000000);
    return _mm512_multishift_epi64_epi8(from, _mm512_set1_epi64((int64_t)word));
}

/* Look up scale and zero of 16 rows among the 8 possible ones of each. A look-up takes four bits of a field; the fourth is the
 * next row's and chooses between two equal tables. */
INLINE void look_up_statistics(const uint8_t *at, __m512 *scale, __m512 *zero) {
    const __m512 steps = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7);
    float of[4];
    _mm_storeu_ps(of, _mm_maskz_cvtph_ps(0xF, _mm_loadl_epi64((const __m128i *)(at + 12))));
    __asm__("" : "+m"(of)); /* loads spread a number at no cost, shuffles would */
    const __m512 scales = _mm512_add_ps(_mm512_set1_ps(of[0]), _mm512_mul_ps(_mm512_set1_ps(of[1]), steps));
    const __m512 zeros = _mm512_add_ps(_mm512_set1_ps(of[2]), _mm512_mul_ps(_mm512_set1_ps(of[3]), steps));
    *scale = _mm512_permutexvar_ps(fields(at), scales);
    *zero = _mm512_permutexvar_ps(fields(at + 6), zeros);
}

/* Multiply `tall` row tiles, `stride` bytes apart, with some tokens, and use each loaded word of inputs for all tiles. */
INLINE void row_tiles(const struct dense *dense, int bits, int subtiles, int tall, const uint8_t *tile, size_t stride,
                      const struct ordered *x, int first, int deep, float *out) {
    const uint8_t *planes = x->planes + (size_t)first * x->step;
    const float *sums = x->sums + (size_t)first * (size_t)dense->groups;
    const int tile_bytes = subtiles * bits * 32 + STATISTICS;
    __m512 total[8];
    UNROLL
    for (int k = 0; k < tall * deep; k++) total[k] = _mm512_setzero_ps();
    for (int g = 0; g < dense->groups; g++, sums++) {
        __m512i high[8], low[8];
        UNROLL
        for (int k = 0; k < tall * deep; k++) high[k] = low[k] = _mm512_setzero_si512();
        UNROLL
        for (int i = 0; i < tall; i++)
            for (int b = 0; b < tile_bytes; b += 64)
                _mm_prefetch((const char *)tile + (size_t)i * stride + FETCHED + b, _MM_HINT_T0);
        for (int s = 0; s < subtiles; s++, tile += bits * 32, planes += PLANES) {
            __m512i code[2][QUADS];
            UNROLL
            for (int i = 0; i < tall; i++) unpack(tile + (size_t)i * stride, bits, code[i]);
            UNROLL
            for (int j = 0; j < QUADS; j++) {
                UNROLL
                for (int t = 0; t < deep; t++) {
                    const uint8_t *at = planes + (size_t)t * x->step + 4 * j;
                    const __m512i x_high = everywhere(at), x_low = everywhere(at + TILE);
                    UNROLL
                    for (int i = 0; i < tall; i++) {
                        high[t * tall + i] = _mm512_dpbusd_epi32(high[t * tall + i], code[i][j], x_high);
                        low[t * tall + i] = _mm512_dpbusd_epi32(low[t * tall + i], code[i][j], x_low);
                    }
                }
            }
        }
        UNROLL
        for (int i = 0; i < tall; i++) {
            __m512 scale, zero;
            look_up_statistics(tile + (size_t)i * stride, &scale, &zero);
            UNROLL
            for (int t = 0; t < deep; t++) {
                const int k = t * tall + i;
                const __m512 product = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high[k], 8), low[k]));
                const __m512 sum = _mm512_set1_ps(sums[t * dense->groups]);
                const __m512 centred = _mm512_sub_ps(product, _mm512_mul_ps(zero, sum));
                total[k] = _mm512_add_ps(total[k], _mm512_mul_ps(scale, centred));
            }
        }
        tile += STATISTICS;
    }
    UNROLL
    for (int k = 0; k < tall * deep; k++) {
        float *to = out + (first + k / tall) * SPQR_ROWS + k % tall * TILE;
        _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), total[k]));
    }
}

INLINE void all_tokens(const struct dense *dense, int bits, int subtiles, const uint8_t *tiles, int tall, const struct ordered *x,
                       int tokens, float *out) {
    /* A single row tile is taken twice; the second result is not used. */
    const size_t stride = tall == 2 ? (size_t)dense->groups * dense->tile_bytes : 0;
    int t = 0;
    for (; t + 4 <= tokens; t += 4) row_tiles(dense, bits, subtiles, 2, tiles, stride, x, t, 4, out);
    for (; t + 2 <= tokens; t += 2) row_tiles(dense, bits, subtiles, 2, tiles, stride, x, t, 2, out);
    for (; t < tokens; t++) row_tiles(dense, bits, subtiles, 2, tiles, stride, x, t, 1, out);
}

static void dense(const struct dense *dense, const uint8_t *tiles, int tall, const struct ordered *x, int tokens, float *out) {
    const int subtiles = dense->subtiles;
    if (dense->bits == 4 && subtiles == 1)
        all_tokens(dense, 4, 1, tiles, tall, x, tokens, out);
    else if (subtiles == 1)
        all_tokens(dense, 3, 1, tiles, tall, x, tokens, out);
    else if (dense->bits == 4)
        all_tokens(dense, 4, subtiles, tiles, tall, x, tokens, out);
    else
        all_tokens(dense, 3, subtiles, tiles, tall, x, tokens, out);
}

/* Multiply up to 16 outliers with their inputs and add the products to the lanes. */
INLINE __m512 add_products(__m512 lanes, const uint8_t *value, const int16_t *given, size_t left) {
    const __mmask16 there = left < LANES ? (__mmask16)((1u << left) - 1) : (__mmask16)0xFFFF;
    const __m512 factor = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(there, value));
    const __m512 x = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm256_maskz_loadu_epi16(there, given)));
    return _mm512_mask_add_ps(lanes, there, lanes, _mm512_mul_ps(factor, x));
}

INLINE float sum_lanes(__m512 lanes) {
    const __m256 upper = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(lanes), 1));
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(lanes), upper);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

static void outliers(const uint8_t *pointer, int rows, const uint8_t *value, const int16_t *given, float *out) {
    for (int i = 0; i < rows; i++, pointer += 4) {
        const size_t count = load_32(pointer + 4) - load_32(pointer);
        __m512 lanes = _mm512_setzero_ps();
        for (size_t k = 0; k < count; k += LANES) lanes = add_products(lanes, value + 2 * k, given + k, count - k);
        out[i] += sum_lanes(lanes);
        value += 2 * count;
        given += count;
    }
}

const struct spqr_kernels bstack_spqr_avx512 = {dense, outliers};

END_OF_TARGET
#endif
