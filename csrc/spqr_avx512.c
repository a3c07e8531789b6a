/* SpQR with AVX-512, VBMI and VNNI: a lane is a row, a dot product of bytes takes four inputs of each of the 16 rows. */
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi,avx512vnni"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512vbmi,avx512vnni")
#endif
#include "spqr.h"
#include "tiles.h"

#ifdef BSTACK_X86
#include <immintrin.h>

enum {
    QUADS = 4,    /* inputs of a subtile, four at a time */
    AHEAD = 2048, /* bytes between what is summed and what is fetched */
};

/* The codes of four inputs after another of 16 rows. */
INLINE void unpack(const uint8_t *subtile, int bits, __m512i *code) {
    if (bits == 4) {
        const __m512i nibble = _mm512_set1_epi8(0x0F);
        UNROLL
        for (int h = 0; h < 2; h++) {
            const __m512i both = _mm512_loadu_si512(subtile + 64 * h);
            code[2 * h] = _mm512_and_si512(both, nibble);
            code[2 * h + 1] = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
        }
    } else {
        const __m512i crumb = _mm512_set1_epi8(3), four = _mm512_set1_epi8(4), all = _mm512_loadu_si512(subtile);
        UNROLL
        for (int j = 0; j < QUADS; j++) {
            const __m512i low = _mm512_and_si512(j ? _mm512_srli_epi16(all, (unsigned)(2 * j)) : all, crumb);
            uint64_t third;
            memcpy(&third, subtile + 64 + 8 * j, 8);
            code[j] = _mm512_mask_add_epi8(low, _cvtu64_mask64(third), low, four);
        }
    }
}

/* A word of memory in every lane. */
INLINE __m512i everywhere(const uint8_t *at) { return _mm512_set1_epi32((int)load_32(at)); }

INLINE __m512i fields(const uint8_t *at) {
    uint64_t word;
    memcpy(&word, at, 8);
    /* Byte 4 r of the result: the eight bits of the word from bit 3 r on. */
    const __m512i from = _mm512_set_epi64(0x2D0000002A, 0x2700000024, 0x210000001E, 0x1B00000018, //
                                          0x1500000012, 0x0F0000000C, 0x0900000006, 0x0300000000);
    return _mm512_multishift_epi64_epi8(from, _mm512_set1_epi64((int64_t)word));
}

/* Scale and zero of 16 rows: of the 8 scales and the 8 zeros that there can be, those that the rows' codes say. */
INLINE void look_up_statistics(const uint8_t *at, __m512 *scale, __m512 *zero) {
    const __m512i seven = _mm512_set1_epi32(7), eight = _mm512_set1_epi32(8);
    const __m512i first = _mm512_set_epi32(2, 2, 2, 2, 2, 2, 2, 2, 0, 0, 0, 0, 0, 0, 0, 0);
    const __m512 steps = _mm512_set_ps(7, 6, 5, 4, 3, 2, 1, 0, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512 halves = _mm512_castps128_ps512(_mm_maskz_cvtph_ps(0xF, _mm_loadl_epi64((const __m128i *)(at + 12))));
    const __m512 start = _mm512_permutexvar_ps(first, halves);
    const __m512 slope = _mm512_permutexvar_ps(_mm512_add_epi32(first, _mm512_set1_epi32(1)), halves);
    const __m512 table = _mm512_add_ps(start, _mm512_mul_ps(slope, steps));
    *scale = _mm512_permutexvar_ps(_mm512_and_si512(fields(at), seven), table);
    *zero = _mm512_permutexvar_ps(_mm512_ternarylogic_epi32(fields(at + 6), seven, eight, 0xEA), table); /* & 7 | 8 */
}

INLINE void row_tile(const struct dense *dense, int bits, int subtiles, const uint8_t *tile, const struct ordered *x, int first,
                     int deep, float *out) {
    const uint8_t *planes = x->planes + (size_t)first * x->step;
    const float *sums = x->sums + (size_t)first * (size_t)dense->groups;
    const int tile_bytes = subtiles * bits * 32 + STATISTICS;
    __m512 total[4];
    UNROLL
    for (int t = 0; t < deep; t++) total[t] = _mm512_setzero_ps();
    for (int g = 0; g < dense->groups; g++, sums++) {
        __m512i high[4], low[4];
        __m512 scale, zero;
        UNROLL
        for (int t = 0; t < deep; t++) high[t] = low[t] = _mm512_setzero_si512();
        for (int b = 0; b < tile_bytes; b += 64) _mm_prefetch((const char *)tile + AHEAD + b, _MM_HINT_T0);
        for (int s = 0; s < subtiles; s++, tile += bits * 32, planes += PLANES) {
            __m512i code[QUADS];
            unpack(tile, bits, code);
            UNROLL
            for (int j = 0; j < QUADS; j++) {
                UNROLL
                for (int t = 0; t < deep; t++) {
                    const uint8_t *at = planes + (size_t)t * x->step + 4 * j;
                    high[t] = _mm512_dpbusd_epi32(high[t], code[j], everywhere(at));
                    low[t] = _mm512_dpbusd_epi32(low[t], code[j], everywhere(at + TILE));
                }
            }
        }
        look_up_statistics(tile, &scale, &zero);
        tile += STATISTICS;
        UNROLL
        for (int t = 0; t < deep; t++) {
            const __m512 product = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high[t], 8), low[t]));
            const __m512 sum = _mm512_set1_ps(sums[t * dense->groups]);
            const __m512 centred = _mm512_sub_ps(product, _mm512_mul_ps(zero, sum));
            total[t] = _mm512_add_ps(total[t], _mm512_mul_ps(scale, centred));
        }
    }
    UNROLL
    for (int t = 0; t < deep; t++) {
        float *to = out + (first + t) * TILE;
        _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), total[t]));
    }
}

INLINE void all_tokens(const struct dense *dense, int bits, int subtiles, const uint8_t *tiles, const struct ordered *x,
                       int tokens, float *out) {
    int t = 0;
    for (; t + 4 <= tokens; t += 4) row_tile(dense, bits, subtiles, tiles, x, t, 4, out);
    for (; t + 2 <= tokens; t += 2) row_tile(dense, bits, subtiles, tiles, x, t, 2, out);
    for (; t < tokens; t++) row_tile(dense, bits, subtiles, tiles, x, t, 1, out);
}

static void dense(const struct dense *dense, const uint8_t *tiles, const struct ordered *x, int tokens, float *out) {
    const int subtiles = dense->subtiles;
    if (dense->bits == 4 && subtiles == 1)
        all_tokens(dense, 4, 1, tiles, x, tokens, out);
    else if (subtiles == 1)
        all_tokens(dense, 3, 1, tiles, x, tokens, out);
    else if (dense->bits == 4)
        all_tokens(dense, 4, subtiles, tiles, x, tokens, out);
    else
        all_tokens(dense, 3, subtiles, tiles, x, tokens, out);
}

static void outliers(const struct outliers *outliers, const uint8_t *pointer, int rows, const float *x, size_t step,
                     int tokens, float *out) {
    for (int i = 0; i < rows; i++, pointer += 4) {
        const size_t start = load_32(pointer), count = load_32(pointer + 4) - start;
        const uint8_t *index = outliers->index + 2 * start, *value = outliers->value + 2 * start;
        for (int t = 0; t < tokens; t++) {
            const float *in = x + (size_t)t * step;
            __m512 lanes = _mm512_setzero_ps();
            for (size_t k = 0; k < count; k += LANES) {
                const __mmask16 there = count - k < LANES ? (__mmask16)((1u << (count - k)) - 1) : (__mmask16)0xFFFF;
                const __m512i at = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, index + 2 * k));
                const __m512 factor = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(there, value + 2 * k));
                const __m512 given = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), there, at, in, 4);
                lanes = _mm512_mask_add_ps(lanes, there, lanes, _mm512_mul_ps(factor, given));
            }
            const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(lanes),
                                               _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(lanes), 1)));
            const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
            const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            out[t * TILE + i] += _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
        }
    }
}

const struct spqr_kernels bstack_spqr_avx512 = {dense, outliers};

#endif
#if defined(__clang__)
#pragma clang attribute pop
#endif
