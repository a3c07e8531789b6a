/* AMX: the products of trellis5 blocks with three to eight operands at once, 16 rows by 8 operands of two planes by 64 columns
 * in one instruction. Fewer operands, and all else, as with AVX-512.
 *
 * Operands stand in tiles of 64 columns: row k has columns 4 k to 4 k + 3, first of operand 0: high bytes, low bytes.
 */
#define TARGET "avx512f,avx512bw,avx512vl,avx512vbmi,avx512vnni,amx-tile,amx-int8"
#include "kernels.h"

#ifdef BSTACK_AMX
#include "avx512.h"

enum { TALL = 16, AT_ONCE = 2 }; /* rows of a tile; tiles of rows that are multiplied by the same operands */

void bstack_amx_place(const uint8_t *codes, size_t groups, int operand, uint8_t *tiles) {
    for (size_t g = 0; g < groups; g++, codes += OPERAND, tiles += TILE_BYTES)
        for (int k = 0; k < TALL; k++) {
            uint8_t *to = tiles + k * WIDE + 8 * operand;
            memcpy(to, codes + 4 * k, 4);
            memcpy(to + 4, codes + WIDE + 4 * k, 4);
        }
}

/* Compilers do not know that tiles are read from memory and written to it. */
#define MEMORY __asm__ volatile("" ::: "memory")

/* Tiles 0 and 1 are sums, 2 operands, 3 and 4 values; all have 16 rows of 64 bytes. */
ALIGNED static const uint8_t config[64] = {
    [0] = 1, [16] = WIDE, [18] = WIDE, [20] = WIDE, [22] = WIDE, [24] = WIDE,
    [48] = TALL, [49] = TALL, [50] = TALL, [51] = TALL, [52] = TALL,
};

void bstack_amx_trellis5(const uint8_t *codes, size_t stride, int width, int rows, const uint8_t *tiles, int operands,
                         int64_t *sums) {
    const __m512i table = _mm512_load_si512(bstack_table5);
    ALIGNED uint8_t value[AT_ONCE][QUARTERS][TALL][WIDE];
    ALIGNED int64_t sum[AT_ONCE * TALL][WIDE / 8];
    _tile_loadconfig(config);
    for (int start = 0; start < rows; start += AT_ONCE * TALL) {
        const int count = rows - start < AT_ONCE * TALL ? rows - start : AT_ONCE * TALL;
        const uint8_t *in = tiles;
        _tile_zero(0);
        _tile_zero(1);
        for (int b = 0; b < width; b += WIDE) {
            const uint8_t *at = codes + (size_t)start * stride + b;
            __m512i row[EARLIER5 + 1];
            UNROLL
            for (int e = 0; e < EARLIER5; e++) row[e + 1] = load(at + (size_t)e * stride, width - b);
            for (int i = 0; i < count; i++) { /* what other rows of the tiles hold does not matter */
                __m512i found[QUARTERS];
                UNROLL
                for (int e = 0; e < EARLIER5; e++) row[e] = row[e + 1];
                row[EARLIER5] = load(at + (size_t)(i + EARLIER5) * stride, width - b);
                values5(row, table, found);
                UNROLL
                for (int quarter = 0; quarter < QUARTERS; quarter++)
                    _mm512_store_si512(value[i / TALL][quarter][i % TALL], found[quarter]);
            }
            MEMORY;
            for (int quarter = 0; quarter < QUARTERS; quarter++, in += TILE_BYTES) {
                _tile_loadd(2, in, WIDE);
                _tile_loadd(3, value[0][quarter], WIDE);
                _tile_dpbusd(0, 3, 2);
                _tile_loadd(4, value[1][quarter], WIDE);
                _tile_dpbusd(1, 4, 2);
            }
            MEMORY;
        }
        _tile_stored(0, sum[0], WIDE);
        _tile_stored(1, sum[TALL], WIDE);
        MEMORY;
        for (int i = 0; i < count; i++) { /* of each operand the sum with high bytes, then that with low bytes, in 32 bits each */
            const __m512i both = _mm512_load_si512(sum[i]), high = _mm512_srai_epi64(_mm512_slli_epi64(both, 32), 32 - 8);
            _mm512_store_si512(sum[i], _mm512_add_epi64(high, _mm512_srai_epi64(both, 32)));
        }
        for (int o = 0; o < operands; o++)
            for (int i = 0; i < count; i++) sums[o * rows + start + i] += sum[i][o];
    }
    _tile_release();
}

END_OF_TARGET
#endif
