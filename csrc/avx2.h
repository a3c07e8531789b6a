/* Compile the functions from here to END_OF_TARGET for AVX2, or for what TARGET names. Include this first. */
#ifndef BSTACK_AVX2_H
#define BSTACK_AVX2_H

#ifndef TARGET
#define TARGET "avx2"
#endif
#include "target.h"

#include "tiles.h"

#ifdef BSTACK_X86
#include <immintrin.h>

/* Turn each bit of a word into a byte: all ones or all zeros. */
INLINE __m256i bytes_of_bits(uint32_t bits) {
    const __m256i spread = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, //
                                            2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
    const __m256i one = _mm256_set1_epi64x((int64_t)0x8040201008040201u);
    const __m256i byte = _mm256_shuffle_epi8(_mm256_set1_epi32((int)bits), spread);
    return _mm256_cmpeq_epi8(_mm256_and_si256(byte, one), one);
}

#endif
#endif
