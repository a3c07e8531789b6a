/* AMX: the products of trellis5 blocks with three to eight operands at once, 16 rows by 8 operands of two planes by 64 columns
 * in one instruction. Fewer operands, and all else, as with AVX-512.
 *
 * Operands stand in tiles of 64 columns: row k has columns 4 k to 4 k + 3, first of operand 0: high bytes, low bytes. Tiles for up
 * to four operands are half as wide: in the nearest cache there is room for twice as many columns.
 */
#define TARGET "avx512f,avx512bw,avx512vl,avx512vbmi,avx512vnni,amx-tile,amx-int8"
#include "kernels.h"

#ifdef BSTACK_AMX
#include "avx512.h"

enum { TALL = 16, AT_ONCE = 2 }; /* rows of a tile; tiles of rows that are multiplied by the same operands */

void bstack_amx_place(const uint8_t *codes, size_t groups, int operand, int operands, uint8_t *tiles) {
    const size_t bytes = tile_bytes(operands);
    const __m512i lines = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i at = _mm512_mullo_epi32(lines, _mm512_set1_epi32((int)bytes / TALL));
    for (size_t g = 0; g < groups; g++, codes += OPERAND, tiles += bytes) {
        _mm512_i32scatter_epi32(tiles + 8 * operand, at, _mm512_loadu_si512(codes), 1);
        _mm512_i32scatter_epi32(tiles + 8 * operand + 4, at, _mm512_loadu_si512(codes + WIDE), 1);
    }
}

/* Compilers do not know that tiles are read from memory and written to it. */
#define MEMORY __asm__ volatile("" ::: "memory")

/* Tiles 0 and 1 are sums, 2 operands, 3 and 4 values; all have 16 rows, of 64 bytes, or 32 with places for four operands. */
#define CONFIG(wide)                                                                                                   \
    {[0] = 1, [16] = (wide), [18] = (wide), [20] = (wide), [22] = WIDE, [24] = WIDE,                                   \
     [48] = TALL, [49] = TALL, [50] = TALL, [51] = TALL, [52] = TALL}
ALIGNED static const uint8_t configs[2][64] = {CONFIG(WIDE / 2), CONFIG(WIDE)};

enum {
    ROWS = 4,   /* that are looked up together */
    SHORTS = 2, /* short pieces that are faster than a whole one */
};
typedef uint8_t values[QUARTERS][AT_ONCE][TALL][WIDE];

/* Look up the values of `count` rows, from row i on: of up to 64 code bytes, or of up to 16 in one register. */
INLINE void look_up(const uint8_t *codes, size_t stride, int left, int count, int is_short, __m512i table, values value, int i) {
    __m512i row[ROWS + EARLIER5], found[QUARTERS];
    codes += (size_t)i * stride;
    if (is_short) {
        load_short(codes, stride, left, count + EARLIER5, row);
    } else {
        UNROLL
        for (int e = 0; e < count + EARLIER5; e++) row[e] = load(codes + (size_t)e * stride, left);
    }
    UNROLL
    for (int e = 0; e < count; e++) {
        const int tile = (i + e) / TALL, line = (i + e) % TALL;
        if (is_short) {
            _mm512_store_si512(value[0][tile][line], values5_short(row + e, table));
            continue;
        }
        values5(row + e, table, found);
        UNROLL
        for (int quarter = 0; quarter < QUARTERS; quarter++) _mm512_store_si512(value[quarter][tile][line], found[quarter]);
    }
}

/* Look up a piece of `count` rows, and add its products. What other rows of the tiles hold does not matter. */
INLINE void add_piece(const uint8_t *codes, size_t stride, int left, int count, int is_short, __m512i table, values value,
                      const uint8_t *tiles, int places) {
    int i = 0;
    for (; i + ROWS <= count; i += ROWS) look_up(codes, stride, left, ROWS, is_short, table, value, i);
    for (; i < count; i++) look_up(codes, stride, left, 1, is_short, table, value, i);
    MEMORY;
    for (int quarter = 0; quarter < (is_short ? 1 : QUARTERS); quarter++, tiles += OPERAND * places) {
        _tile_loadd(2, tiles, 8 * places);
        _tile_loadd(3, value[quarter][0], WIDE);
        _tile_dpbusd(0, 3, 2);
        _tile_loadd(4, value[quarter][1], WIDE);
        _tile_dpbusd(1, 4, 2);
    }
    MEMORY;
}

INLINE void multiply(const uint8_t *codes, size_t stride, int width, int rows, const uint8_t *tiles, int operands, int places,
                     int64_t *sums) {
    const int bytes = OPERAND * places, part = bytes / QUARTERS; /* of a tile, and of the operands of 16 columns */
    const __m512i table = _mm512_load_si512(bstack_table5);
    ALIGNED values value;
    ALIGNED uint8_t rest[SHORTS][OPERAND * 8]; /* the operands of short pieces */
    ALIGNED int64_t sum[AT_ONCE * TALL * 8];
    const int whole = width - width % WIDE, shorts = width - whole <= SHORTS * SHORT ? (width - whole + SHORT - 1) / SHORT : 0;
    const uint8_t *const last = tiles + (size_t)(whole * QUARTERS * places * 2);
    for (int k = 0; k < shorts; k++)
        for (int quarter = 0; quarter < QUARTERS; quarter++)
            memcpy(rest[k] + quarter * part, last + quarter * bytes + k * part, (size_t)part);
    for (int start = 0; start < rows; start += AT_ONCE * TALL) {
        const int count = rows - start < AT_ONCE * TALL ? rows - start : AT_ONCE * TALL;
        const uint8_t *at = codes + (size_t)start * stride, *in = tiles;
        const uint8_t *ahead = at + (size_t)(count + EARLIER5) * stride + AHEAD;
        int left = width;
        _tile_zero(0);
        _tile_zero(1);
        for (; left >= WIDE; left -= WIDE, at += WIDE, ahead += count * WIDE, in += QUARTERS * bytes) {
            prefetch(ahead, count * WIDE);
            add_piece(at, stride, WIDE, count, 0, table, value, in, places);
        }
        prefetch(ahead, count * left);
        if (!shorts && left) add_piece(at, stride, left, count, 0, table, value, in, places);
        for (int k = 0; k < shorts; k++) add_piece(at + k * SHORT, stride, left - k * SHORT, count, 1, table, value, rest[k], places);
        _tile_stored(0, sum, 8 * places);
        _tile_stored(1, sum + TALL * places, 8 * places);
        MEMORY;
        for (int i = 0; i < count * places; i += WIDE / 8) { /* each is a sum with high bytes, then one with low bytes, of 32 bits */
            const __m512i both = _mm512_load_si512(sum + i), high = _mm512_srai_epi64(_mm512_slli_epi64(both, 32), 32 - 8);
            _mm512_store_si512(sum + i, _mm512_add_epi64(high, _mm512_srai_epi64(both, 32)));
        }
        for (int o = 0; o < operands; o++)
            for (int i = 0; i < count; i++) sums[o * rows + start + i] += sum[i * places + o];
    }
}

void bstack_amx_trellis5(const uint8_t *codes, size_t stride, int width, int rows, const uint8_t *tiles, int operands,
                         int64_t *sums) {
    if (tile_bytes(operands) == 4 * OPERAND)
        multiply(codes, stride, width, rows, tiles, operands, 4, sums);
    else
        multiply(codes, stride, width, rows, tiles, operands, 8, sums);
}

void bstack_amx_begin(int operands) { _tile_loadconfig(configs[tile_bytes(operands) / (4 * OPERAND) - 1]); }
void bstack_amx_end(void) { _tile_release(); }

END_OF_TARGET
#endif
