/* Compile the functions from here to END_OF_TARGET for AVX-512 with VBMI and VNNI. Include this first. */
#ifndef BSTACK_AVX512_H
#define BSTACK_AVX512_H

/* Before all other headers, so that their inline functions are compiled for AVX-512 too. */
#if defined(__x86_64__) && defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi,avx512vnni"))), apply_to = function)
#define END_OF_TARGET _Pragma("clang attribute pop")
#elif defined(__x86_64__) && defined(__GNUC__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512vbmi,avx512vnni")
#define END_OF_TARGET
#endif

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

/* Write 32 words as 256 high + low, both signed bytes. */
INLINE void write_bytes(__m512i words, uint8_t *high, uint8_t *low) {
    const __m512i lower = _mm512_srai_epi16(_mm512_slli_epi16(words, 8), 8);
    const __m512i upper = _mm512_srai_epi16(_mm512_sub_epi16(words, lower), 8);
    _mm256_storeu_si256((__m256i *)high, _mm512_cvtepi16_epi8(upper));
    _mm256_storeu_si256((__m256i *)low, _mm512_cvtepi16_epi8(lower));
}

#endif
#endif
