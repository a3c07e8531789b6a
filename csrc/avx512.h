/* Compile the functions from here to END_OF_TARGET for AVX-512 with VBMI and VNNI, and what else TARGET names. Include this first. */
#ifndef BSTACK_AVX512_H
#define BSTACK_AVX512_H

#ifndef TARGET
#define TARGET "avx512f,avx512bw,avx512vl,avx512vbmi,avx512vnni"
#endif
#include "target.h"

#include "tiles.h"

#ifdef BSTACK_X86
#include <immintrin.h>

/* Keep a register loaded for several uses: compilers would read memory each time, which is slower across cache lines. */
#define KEEP(vector) __asm__("" : "+v"(vector))

/* Load 16 bytes from each of four places, `apart` bytes apart. */
INLINE __m512i from_four(const uint8_t *at, size_t apart) {
    __m512i all = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)at));
    all = _mm512_inserti32x4(all, _mm_loadu_si128((const __m128i *)(at + apart)), 1);
    all = _mm512_inserti32x4(all, _mm_loadu_si128((const __m128i *)(at + 2 * apart)), 2);
    return _mm512_inserti32x4(all, _mm_loadu_si128((const __m128i *)(at + 3 * apart)), 3);
}

enum {
    WIDE = 64,    /* bytes of a register */
    SHORT = 16,   /* code bytes whose windows fill one */
    AHEAD = 2048, /* bytes that the prefetch is ahead of the sums */
};

/* Fetch the bytes of the next tiles, in order. The hardware does not predict the rows of a tile, several streams in one page.
 * Addresses past the block do no harm. */
INLINE void prefetch(const uint8_t *at, int bytes) {
    for (int b = 0; b < bytes; b += WIDE) _mm_prefetch((const char *)at + b, _MM_HINT_T0);
}

/* Load the first `left` bytes of a register, at most all of it. */
INLINE __m512i load(const uint8_t *at, int left) {
    return left >= WIDE ? _mm512_loadu_si512(at) : _mm512_maskz_loadu_epi8(_cvtu64_mask64((1ull << left) - 1), at);
}

/* Take the bits of a where the mask is set, of b elsewhere. */
INLINE __m512i select_bits(__m512i mask, __m512i a, __m512i b) { return _mm512_ternarylogic_epi64(mask, a, b, 0xCA); }

/* Values of a register of code bytes of a row of a trellis5 block, quarter by quarter; its code rows are rows 0 to 4. A
 * permutation looks at the low six bits of each byte, so what stands above them does not matter. */
INLINE void values5(const __m512i *row, __m512i table, __m512i *value) {
    const __m512i crumbs = _mm512_set1_epi8(0x33), nibble = _mm512_set1_epi8(0x0F), third = row[1];
    const __m512i mixed = _mm512_ternarylogic_epi64(row[4], row[2], row[0], 0x96);
    const __m512i even = select_bits(crumbs, row[3], _mm512_slli_epi16(mixed, 2)); /* quarters 0 and 2 */
    const __m512i odd = select_bits(crumbs, _mm512_srli_epi16(row[3], 2), mixed);  /* quarters 1 and 3 */
    value[0] = _mm512_permutexvar_epi8(select_bits(nibble, even, _mm512_slli_epi16(third, 4)), table);
    value[1] = _mm512_permutexvar_epi8(select_bits(nibble, odd, _mm512_slli_epi16(third, 2)), table);
    value[2] = _mm512_permutexvar_epi8(select_bits(nibble, _mm512_srli_epi16(even, 4), third), table);
    value[3] = _mm512_permutexvar_epi8(select_bits(nibble, _mm512_srli_epi16(odd, 4), _mm512_srli_epi16(third, 2)), table);
}

/* Load up to 16 code bytes of some rows four times over, the code of each 128 bits' quarter in the low bits. */
INLINE void load_short(const uint8_t *codes, size_t stride, int left, int count, __m512i *row) {
    const int64_t by_2 = 0x0002000200020002; /* four words */
    const __m512i shift = _mm512_set_epi64(3 * by_2, 3 * by_2, 2 * by_2, 2 * by_2, by_2, by_2, 0, 0);
    UNROLL
    for (int e = 0; e < count; e++) {
        const uint8_t *at = codes + (size_t)e * stride;
        const __m128i bytes = left >= SHORT ? _mm_loadu_si128((const __m128i *)at)
                                            : _mm_maskz_loadu_epi8((__mmask16)((1u << left) - 1), at);
        row[e] = _mm512_srlv_epi16(_mm512_broadcast_i32x4(bytes), shift);
    }
}

/* The same as values5 for up to 16 code bytes, from load_short: a quarter in each 128 bits. */
INLINE __m512i values5_short(const __m512i *row, __m512i table) {
    const __m512i mixed = _mm512_ternarylogic_epi64(row[4], row[2], row[0], 0x96);
    const __m512i pair = select_bits(_mm512_set1_epi8(0x03), row[3], _mm512_slli_epi16(mixed, 2));
    return _mm512_permutexvar_epi8(select_bits(_mm512_set1_epi8(0x0F), pair, _mm512_slli_epi16(row[1], 4)), table);
}

/* Write 32 words as 256 high + low, both signed bytes. */
INLINE void write_bytes(__m512i words, uint8_t *high, uint8_t *low) {
    const __m512i lower = _mm512_srai_epi16(_mm512_slli_epi16(words, 8), 8);
    const __m512i upper = _mm512_srai_epi16(_mm512_sub_epi16(words, lower), 8);
    _mm256_storeu_si256((__m256i *)high, _mm512_cvtepi16_epi8(upper));
    _mm256_storeu_si256((__m256i *)low, _mm512_cvtepi16_epi8(lower));
}

#endif
#endif
