/* Products of digits with AMX: 16 columns by 16 rows by 64 columns before them in one instruction. */
#define TARGET "avx512f,avx512bw,avx512vl,avx512vbmi,avx512vnni,amx-tile,amx-int8"
#include "kernels.h"

#ifdef BSTACK_AMX
#include "avx512.h"

#include "feedback.h"

/* Compilers do not know that tiles are read from memory and written to it. */
#define MEMORY __asm__ volatile("" ::: "memory")

/* All tiles have 16 rows of 64 bytes: 0 to 3 are sums, 4 and 5 digits, 6 and 7 values. */
ALIGNED static const uint8_t config[64] = {
    [0] = 1, [16] = WIDE, [18] = WIDE, [20] = WIDE, [22] = WIDE, [24] = WIDE, [26] = WIDE, [28] = WIDE, [30] = WIDE,
    [48] = TALL, [49] = TALL, [50] = TALL, [51] = TALL, [52] = TALL, [53] = TALL, [54] = TALL, [55] = TALL,
};

static void products(const int8_t *left, size_t step, int tiles, const int8_t *left_next, const uint8_t *right, const uint8_t *right_next,
                     int pieces, int32_t *sums) {
    enum { LINES = 6 }; /* of 32 of a piece, while two of twelve tiles are multiplied */
    _tile_loadconfig(config);
    for (int t = 0; t < tiles; t += 2, sums += 2 * RIGHT * SUM) {
        const int8_t *one = left + (size_t)t * step * TILE, *two = one + step * TILE;
        const uint8_t *at = right, *ahead = right_next + t / 2 * LINES * WIDE;
        const uint8_t *one_ahead = (const uint8_t *)left_next + (size_t)t * step * TILE, *two_ahead = one_ahead + step * TILE;
        MEMORY;
        _tile_loadd(0, sums, WIDE);
        _tile_loadd(1, sums + SUM, WIDE);
        _tile_loadd(2, sums + 2 * SUM, WIDE);
        _tile_loadd(3, sums + 3 * SUM, WIDE);
        for (int p = 0; p < pieces; p++, one += TILE, two += TILE, at += RIGHT * TILE, ahead += RIGHT * TILE) {
            prefetch(ahead, LINES * WIDE);
            prefetch(one_ahead + p * TILE, 2 * WIDE);
            prefetch(two_ahead + p * TILE, 2 * WIDE);
            _tile_loadd(6, at, WIDE);
            _tile_loadd(4, one, WIDE);
            _tile_dpbsud(0, 4, 6);
            _tile_loadd(7, at + TILE, WIDE);
            _tile_dpbsud(1, 4, 7);
            _tile_loadd(5, two, WIDE);
            _tile_dpbsud(2, 5, 6);
            _tile_dpbsud(3, 5, 7);
        }
        _tile_stored(0, sums, WIDE);
        _tile_stored(1, sums + SUM, WIDE);
        _tile_stored(2, sums + 2 * SUM, WIDE);
        _tile_stored(3, sums + 3 * SUM, WIDE);
        MEMORY;
    }
    _tile_release();
}

static void look_up(const uint8_t *codes, int rows, uint8_t *values) {
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

const struct feedback bstack_feedback_amx = {.products = products, .look_up = look_up};

END_OF_TARGET
#endif
