/* AVX-512 with VBMI and VNNI, sign blocks: four weights at once by table.
 *
 * Four sign bits choose one of 16 sums of their four inputs. A register holds the tables of 16 columns, so one permutation
 * looks up the sums of 16 rows, four to a row, which a dot product with ones adds to the row's 32-bit lane (look-ups in
 * place of products: T-MAC, arXiv 2407.00088). Sums have a high and a low byte, both signed, and a table for each.
 */
#include "avx512.h"
#include "avx512_sign.h"

#ifdef BSTACK_X86
enum {
    WIDE = 64,          /* bytes of a register */
    PIECE = 16,         /* sign bytes of a row that are read at once */
    LANES = 16,         /* rows of a register of 32-bit sums */
    HALVES = 2,         /* of a byte of signs */
    COLUMNS = 32,       /* of a lane: four bytes of signs */
    TABLES = AVX512_TABLES * COLUMNS / GROUP, /* for either half of a byte: high bytes, low bytes */
};

/* The sums of four inputs for each of 16 choices, of two groups of four. */
INLINE __m512i sums_of(const int16_t *first, const int16_t *second) {
    __m512i sums = _mm512_setzero_si512();
    UNROLL
    for (int j = 0; j < 4; j++) {
        /* Words whose place has bit j set: 2^j words without and 2^j words with it, in turn. */
        const __mmask32 with = (__mmask32)(j == 0 ? 0xAAAAAAAAu : j == 1 ? 0xCCCCCCCCu : j == 2 ? 0xF0F0F0F0u : 0xFF00FF00u);
        const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_set1_epi16(first[j])),
                                                _mm256_set1_epi16(second[j]), 1);
        sums = _mm512_mask_add_epi16(sums, with, sums, both);
    }
    return sums;
}

void bstack_avx512_tabulate(const int16_t *x, size_t groups, uint8_t *out) {
    for (size_t c = 0; c < groups * GROUP; c += COLUMNS, x += COLUMNS)
        for (int half = 0; half < HALVES; half++, out += 2 * WIDE)
            for (int i = 0; i < 2; i++) { /* bytes 0 and 1 of the lane, and 2 and 3 */
                const int16_t *at = x + 16 * i + 4 * half;
                write_bytes(sums_of(at, at + 8), out + WIDE / 2 * i, out + WIDE + WIDE / 2 * i);
            }
}

/* 16 bytes of rows 0, 4, 8 and 12 from `at`, a row in each 128 bits. */
INLINE __m512i four_rows(const uint8_t *at, size_t stride) { return from_four(at, 4 * stride); }

/* The same where only `rows` rows and `left` bytes of each are there; zeros elsewhere. */
INLINE __m512i last_four_rows(const uint8_t *at, size_t stride, int rows, int left) {
    const __mmask16 there = (__mmask16)((1u << (left < PIECE ? left : PIECE)) - 1);
    ALIGNED uint8_t all[WIDE] = {0};
    for (int k = 0; 4 * k < rows && k < 4; k++)
        _mm_store_si128((__m128i *)all + k, _mm_maskz_loadu_epi8(there, at + (size_t)(4 * k) * stride));
    return _mm512_load_si512(all);
}

/* Four bytes of each of 16 rows, in the rows' lanes: bits[d] holds bytes 4 d to 4 d + 3. */
INLINE void transpose(const __m512i *row, __m512i *bits) {
    const __m512i a = _mm512_unpacklo_epi32(row[0], row[1]), b = _mm512_unpacklo_epi32(row[2], row[3]);
    const __m512i c = _mm512_unpackhi_epi32(row[0], row[1]), d = _mm512_unpackhi_epi32(row[2], row[3]);
    bits[0] = _mm512_unpacklo_epi64(a, b);
    bits[1] = _mm512_unpackhi_epi64(a, b);
    bits[2] = _mm512_unpacklo_epi64(c, d);
    bits[3] = _mm512_unpackhi_epi64(c, d);
}

/* Registers that a sum of one operand is spread over: as many as it takes not to wait for the sum before. */
INLINE int chains(int deep) { return deep == 1 ? 2 : 1; }

/* Half of 32 columns, of `sets` times 16 rows with their bits, and of `deep` operands with their tables. */
INLINE void look_up(const __m512i *bits, int half, int sets, const uint8_t *tables, size_t step, int deep, __m512i *high,
                    __m512i *low) {
    const __m512i nibble = _mm512_set1_epi8(0x0F), ones = _mm512_set1_epi8(1);
    const __m512i first = _mm512_set1_epi32(0x30201000); /* where the tables of a lane's bytes begin */
    __m512i index[2];
    UNROLL
    for (int s = 0; s < sets; s++) /* (bits & nibble) | first */
        index[s] = _mm512_ternarylogic_epi64(half ? _mm512_srli_epi16(bits[4 * s], 4) : bits[4 * s], nibble, first, 0xEA);
    UNROLL
    for (int o = 0; o < deep; o++) {
        const uint8_t *sums = tables + (size_t)o * step + (size_t)half * 2 * WIDE;
        __m512i high_sums = _mm512_loadu_si512(sums), low_sums = _mm512_loadu_si512(sums + WIDE);
        KEEP(high_sums);
        KEEP(low_sums);
        UNROLL
        for (int s = 0; s < sets; s++) {
            const int k = (o + half % chains(deep)) * sets + s;
            high[k] = _mm512_dpbusd_epi32(high[k], ones, _mm512_permutexvar_epi8(index[s], high_sums));
            low[k] = _mm512_dpbusd_epi32(low[k], ones, _mm512_permutexvar_epi8(index[s], low_sums));
        }
    }
}

/* The first row of the register `row[k]` of a tile. */
INLINE int row_of(int k) { return k / 4 * LANES + k % 4; }

/* Rows 0 to `rows` - 1, no more than 16 for each set. */
INLINE void tile_of(const uint8_t *bits, size_t stride, int width, int rows, int sets, const uint8_t *x, size_t step, int deep,
                    int64_t *sums, int all_rows) {
    __m512i high[4], low[4];
    UNROLL
    for (int k = 0; k < sets * deep * chains(deep); k++) high[k] = low[k] = _mm512_setzero_si512();
    const size_t tables = TABLES * PIECE / 4; /* bytes of a piece's */
    /* Of whole registers of rows, pieces may be read past the end of a row: what comes there meets tables of zeros, or none,
     * and after the last row come its factors. */
    const int full = rows == sets * LANES;
    __m512i row[8] = {_mm512_setzero_si512()}, piece[8];
    int b = 0;
    if (full) {
        UNROLL
        for (int k = 0; k < 4 * sets; k++) row[k] = four_rows(bits + (size_t)row_of(k) * stride, stride);
        for (; b + PIECE <= width; b += PIECE, x += tables) {
            const uint8_t *next = bits + (b + PIECE < width ? b + PIECE : b);
            /* A tile reads a few bytes of each row at a time, which the hardware does not foresee: ask for the tile after
             * the next in the order of memory, and for the bytes after the next in the order of reading. */
            const char *far = (const char *)bits + (size_t)rows * (2 * stride + (size_t)b);
            const char *near = (const char *)next + (size_t)(b / PIECE % 4 * 4) * stride + WIDE;
            UNROLL
            for (int s = 0; s < sets; s++) transpose(row + 4 * s, piece + 4 * s);
            /* The next piece is read between the look-ups, which leave room for it. */
            UNROLL
            for (int k = 0; k < 4 * HALVES; k++) {
                if (k % HALVES == 0) {
                    UNROLL
                    for (int s = 0; s < sets; s++) {
                        const int r = 4 * s + k / HALVES;
                        row[r] = four_rows(next + (size_t)row_of(r) * stride, stride);
                        _mm_prefetch(far + WIDE * r, _MM_HINT_T1);
                        _mm_prefetch(near + (size_t)row_of(r) * stride, _MM_HINT_T0);
                    }
                }
                look_up(piece + k / HALVES, k % HALVES, sets, x + (size_t)(k / HALVES) * TABLES, step, deep, high, low);
            }
        }
    }
    for (; b < width; b += PIECE, x += tables) {
        if (!full) {
            UNROLL
            for (int k = 0; k < 4 * sets; k++)
                row[k] = last_four_rows(bits + (size_t)row_of(k) * stride + b, stride, rows - row_of(k), width - b);
        }
        UNROLL
        for (int s = 0; s < sets; s++) transpose(row + 4 * s, piece + 4 * s);
        UNROLL
        for (int k = 0; k < 4 * HALVES; k++) {
            if (k / HALVES * 4 >= width - b) break; /* no tables follow */
            look_up(piece + k / HALVES, k % HALVES, sets, x + (size_t)(k / HALVES) * TABLES, step, deep, high, low);
        }
    }
    UNROLL
    for (int k = 0; k < sets * deep; k++) {
        if (chains(deep) == 2) {
            high[k] = _mm512_add_epi32(high[k], high[k + sets]);
            low[k] = _mm512_add_epi32(low[k], low[k + sets]);
        }
        ALIGNED int32_t sum[LANES];
        _mm512_store_si512(sum, _mm512_add_epi32(_mm512_slli_epi32(high[k], 8), low[k]));
        const int first = k % sets * LANES, last = rows < first + LANES ? rows : first + LANES;
        for (int i = first; i < last; i++) sums[(size_t)(k / sets) * (size_t)all_rows + (size_t)i] += sum[i - first];
    }
}

void bstack_avx512_sum_signs(SUM_ARGUMENTS) {
    for (int i = 0; i < rows;) {
        const int tall = rows - i < 2 * LANES ? rows - i : 2 * LANES;
        const uint8_t *bits = packed + (size_t)i * stride;
        for (int o = 0; o < operands;) {
            const int deep = operands - o < 2 ? 1 : 2;
            const uint8_t *in = x + (size_t)o * step;
            int64_t *to = sums + (size_t)o * (size_t)rows + i;
            if (tall > LANES)
                deep == 2 ? tile_of(bits, stride, width, tall, 2, in, step, 2, to, rows)
                          : tile_of(bits, stride, width, tall, 2, in, step, 1, to, rows);
            else
                deep == 2 ? tile_of(bits, stride, width, tall, 1, in, step, 2, to, rows)
                          : tile_of(bits, stride, width, tall, 1, in, step, 1, to, rows);
            o += deep;
        }
        i += tall;
    }
}

END_OF_TARGET
#endif
