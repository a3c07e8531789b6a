/* AVX-512 with VBMI and VNNI: 64 weights are looked up by two permutations, and summed by two dot products of bytes.
 *
 * Inputs are arranged in two planes: high bytes and low bytes of 64 codes, both signed, code = 256 high + low.
 */
#include "avx512.h"

#ifdef BSTACK_X86
static void arrange(int16_t *x, size_t groups) {
    for (size_t g = 0; g < groups; g++, x += GROUP) {
        const __m512i first = _mm512_loadu_si512(x), second = _mm512_loadu_si512(x + GROUP / 2);
        uint8_t *out = (uint8_t *)x;
        write_bytes(first, out, out + WIDE);
        write_bytes(second, out + WIDE / 2, out + WIDE + WIDE / 2);
    }
}

/* Sum the lanes of each of four registers. */
INLINE __m128i sum_lanes(const __m512i *a) {
    const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a[0], a[1]), _mm512_unpackhi_epi32(a[0], a[1]));
    const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(a[2], a[3]), _mm512_unpackhi_epi32(a[2], a[3]));
    const __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

/* Add 256 high + low to the sums of a tile: `tile_rows` rows by `depth` operands, lanes [operand * tile_rows + row]. */
INLINE void add_sums(const __m512i *high, const __m512i *low, int tile_rows, int depth, int64_t *sums, int rows) {
    UNROLL
    for (int k = 0; k < tile_rows * depth; k += 4) {
        __m512i h[4], l[4];
        UNROLL
        for (int e = 0; e < 4; e++) {
            h[e] = k + e < tile_rows * depth ? high[k + e] : _mm512_setzero_si512();
            l[e] = k + e < tile_rows * depth ? low[k + e] : _mm512_setzero_si512();
        }
        const __m256i h64 = _mm256_cvtepi32_epi64(sum_lanes(h)), l64 = _mm256_cvtepi32_epi64(sum_lanes(l));
        const __m256i all = _mm256_add_epi64(_mm256_slli_epi64(h64, 8), l64);
        if (tile_rows == 4) {
            __m256i *to = (__m256i *)(sums + k / 4 * rows);
            _mm256_storeu_si256(to, _mm256_add_epi64(_mm256_loadu_si256(to), all));
        } else {
            int64_t total[4];
            _mm256_storeu_si256((__m256i *)total, all);
            UNROLL
            for (int e = 0; e < 4; e++)
                if (k + e < tile_rows * depth) sums[(k + e) / tile_rows * rows + (k + e) % tile_rows] += total[e];
        }
    }
}

/* Look up the values of windows; `upper` marks those with their top bit set. The second look-up keeps the results of the
 * first: a blend of two would take a sixth longer. */
INLINE __m512i look_up(const __m512i *table, __m512i window, __mmask64 upper) {
    const __m512i found = _mm512_mask2_permutex2var_epi8(table[2], window, upper, table[3]);
    return _mm512_mask2_permutex2var_epi8(table[0], found, _knot_mask64(upper), table[1]);
}

/* Multiply the values of a register of code bytes of `tile_rows` rows, quarter by quarter, by all operands. */
INLINE void multiply_add(const __m512i (*value)[QUARTERS], int tile_rows, const uint8_t *x, size_t step, int depth, __m512i *high,
                         __m512i *low) {
    UNROLL
    for (int quarter = 0; quarter < QUARTERS; quarter++)
        UNROLL
        for (int o = 0; o < depth; o++) {
            const uint8_t *at = x + (size_t)o * step + (size_t)quarter * OPERAND;
            const __m512i x_high = _mm512_loadu_si512(at), x_low = _mm512_loadu_si512(at + WIDE);
            UNROLL
            for (int i = 0; i < tile_rows; i++) {
                high[o * tile_rows + i] = _mm512_dpbusd_epi32(high[o * tile_rows + i], value[i][quarter], x_high);
                low[o * tile_rows + i] = _mm512_dpbusd_epi32(low[o * tile_rows + i], value[i][quarter], x_low);
            }
        }
}

/* The same for values of 64 columns, a quarter in each 128 bits. */
INLINE void multiply_add_short(const __m512i *value, int tile_rows, const uint8_t *x, size_t step, int depth, __m512i *high,
                               __m512i *low) {
    UNROLL
    for (int o = 0; o < depth; o++) {
        const uint8_t *at = x + (size_t)o * step; /* 16 bytes from each quarter's inputs */
        const __m512i x_high = from_four(at, OPERAND), x_low = from_four(at + WIDE, OPERAND);
        UNROLL
        for (int i = 0; i < tile_rows; i++) {
            high[o * tile_rows + i] = _mm512_dpbusd_epi32(high[o * tile_rows + i], value[i], x_high);
            low[o * tile_rows + i] = _mm512_dpbusd_epi32(low[o * tile_rows + i], value[i], x_low);
        }
    }
}

/* Add one register of code bytes of `tile_rows` rows: 256 columns, 64 of each quarter. */
INLINE void trellis_step(const uint8_t *codes, size_t stride, int left, int tile_rows, const uint8_t *x, size_t step, int depth,
                         const __m512i *table, __m512i *high, __m512i *low) {
    const __m512i crumbs = _mm512_set1_epi8(0x33), nibble = _mm512_set1_epi8(0x0F);
    __m512i row[8], even[8], odd[8], value[4][QUARTERS];
    UNROLL
    for (int e = 0; e < tile_rows + EARLIER; e++) row[e] = load(codes + (size_t)e * stride, left);
    UNROLL
    for (int e = 0; e < tile_rows + 2; e++) { /* two rows' codes of quarters 0, 2 and of 1, 3; the older row's higher */
        even[e] = select_bits(crumbs, row[e + 1], _mm512_slli_epi16(row[e], 2));
        odd[e] = select_bits(crumbs, _mm512_srli_epi16(row[e + 1], 2), row[e]);
    }
    UNROLL
    for (int quarter = 0; quarter < QUARTERS; quarter++) {
        const __m512i *pair = quarter & 1 ? odd : even, top = _mm512_set1_epi8((char)(2 << 2 * quarter));
        UNROLL
        for (int i = 0; i < tile_rows; i++) {
            const __m512i window = quarter & 2 ? select_bits(nibble, _mm512_srli_epi16(pair[i + 2], 4), pair[i])
                                               : select_bits(nibble, pair[i + 2], _mm512_slli_epi16(pair[i], 4));
            /* The top bit is the oldest code's, so it is known before the window is complete. */
            value[i][quarter] = look_up(table, window, _mm512_test_epi8_mask(row[i], top));
        }
    }
    multiply_add(value, tile_rows, x, step, depth, high, low);
}

/* Add up to 16 code bytes of `tile_rows` rows. */
INLINE void trellis_short_step(const uint8_t *codes, size_t stride, int left, int tile_rows, const uint8_t *x, size_t step,
                               int depth, const __m512i *table, __m512i *high, __m512i *low) {
    __m512i row[8], pair[8], value[4]; /* pair: of rows e and e + 1, the older row's code higher */
    load_short(codes, stride, left, tile_rows + EARLIER, row);
    UNROLL
    for (int e = 0; e < tile_rows + 2; e++) pair[e] = select_bits(_mm512_set1_epi8(0x03), row[e + 1], _mm512_slli_epi16(row[e], 2));
    UNROLL
    for (int i = 0; i < tile_rows; i++) {
        const __m512i window = select_bits(_mm512_set1_epi8(0x0F), pair[i + 2], _mm512_slli_epi16(pair[i], 4));
        value[i] = look_up(table, window, _mm512_movepi8_mask(window));
    }
    multiply_add_short(value, tile_rows, x, step, depth, high, low);
}

/* Take OFFSET away by turning the top bit of each byte. */
INLINE __m512i without_offset(__m512i values) { return _mm512_xor_si512(values, _mm512_set1_epi8((char)OFFSET)); }

INLINE __mmask16 first_lanes(int count) { return count < 16 ? (__mmask16)((1u << count) - 1) : (__mmask16)0xFFFF; }

INLINE __m512 add_codes(__m512 sum, const int8_t *codes, __m512 factor) {
    const __m512i codes32 = _mm512_cvtepi8_epi32(_mm_load_si128((const __m128i *)codes));
    return _mm512_add_ps(sum, _mm512_mul_ps(_mm512_cvtepi32_ps(codes32), factor));
}

/* Add scale * T to a row's columns: `values` are those of a register of code bytes from b on, quarter by quarter. */
INLINE void add_values(const __m512i *values, int b, int q, int columns, __m512 factor, float *out) {
    UNROLL
    for (int quarter = 0; quarter < QUARTERS; quarter++) {
        ALIGNED int8_t value[WIDE];
        _mm512_store_si512(value, without_offset(values[quarter]));
        const int from = quarter * q + b, own = q - b < columns - from ? q - b : columns - from;
        const int length = own < WIDE ? own : WIDE;
        for (int j = 0; j < length; j += 16) {
            const __mmask16 there = first_lanes(length - j);
            const __m512 sum = add_codes(_mm512_maskz_loadu_ps(there, out + from + j), value + j, factor);
            _mm512_mask_storeu_ps(out + from + j, there, sum);
        }
    }
}

static void decode(const uint8_t *codes, int columns, float scale, float *out) {
    const __m512i crumbs = _mm512_set1_epi8(0x33), nibble = _mm512_set1_epi8(0x0F);
    const int q = (int)quarter_of(columns);
    __m512i table[4];
    UNROLL
    for (int k = 0; k < 4; k++) table[k] = _mm512_loadu_si512(bstack_table + k * WIDE);
    for (int b = 0; b < q; b += WIDE) {
        __m512i row[EARLIER + 1], even[2], odd[2];
        UNROLL
        for (int e = 0; e <= EARLIER; e++) row[e] = load(codes + (size_t)e * (size_t)q + b, q - b);
        UNROLL
        for (int e = 0; e < 2; e++) {
            even[e] = select_bits(crumbs, row[2 * e + 1], _mm512_slli_epi16(row[2 * e], 2));
            odd[e] = select_bits(crumbs, _mm512_srli_epi16(row[2 * e + 1], 2), row[2 * e]);
        }
        __m512i window[QUARTERS] = {
            select_bits(nibble, even[1], _mm512_slli_epi16(even[0], 4)),
            select_bits(nibble, odd[1], _mm512_slli_epi16(odd[0], 4)),
            select_bits(nibble, _mm512_srli_epi16(even[1], 4), even[0]),
            select_bits(nibble, _mm512_srli_epi16(odd[1], 4), odd[0]),
        };
        UNROLL
        for (int quarter = 0; quarter < QUARTERS; quarter++)
            window[quarter] = look_up(table, window[quarter], _mm512_movepi8_mask(window[quarter]));
        add_values(window, b, q, columns, _mm512_set1_ps(scale), out);
    }
}

/* Rows of `blocks` blocks, added in registers: a column is read and written once. */
INLINE void decode5_blocks(const uint8_t *const *codes, const float *scale, int blocks, int columns, int zeros, float *out) {
    const __m512i table = _mm512_load_si512(bstack_table5);
    const int q = (int)quarter_of(columns);
    __m512 factor[STACKED];
    UNROLL
    for (int k = 0; k < blocks; k++) factor[k] = _mm512_set1_ps(scale[k]);
    for (int b = 0; b < q; b += WIDE) {
        ALIGNED int8_t kept[STACKED][QUARTERS][WIDE];
        UNROLL
        for (int k = 0; k < blocks; k++) {
            __m512i row[EARLIER5 + 1], value[QUARTERS];
            UNROLL
            for (int e = 0; e <= EARLIER5; e++) row[e] = load(codes[k] + (size_t)e * (size_t)q + b, q - b);
            values5(row, table, value);
            UNROLL
            for (int quarter = 0; quarter < QUARTERS; quarter++) _mm512_store_si512(kept[k][quarter], without_offset(value[quarter]));
        }
        for (int quarter = 0; quarter < QUARTERS; quarter++) {
            const int from = quarter * q + b, own = q - b < columns - from ? q - b : columns - from;
            const int length = own < WIDE ? own : WIDE;
            if (length == WIDE) {
                UNROLL
                for (int j = 0; j < WIDE; j += 16) {
                    __m512 sum = zeros ? _mm512_setzero_ps() : _mm512_loadu_ps(out + from + j);
                    UNROLL
                    for (int k = 0; k < blocks; k++) sum = add_codes(sum, kept[k][quarter] + j, factor[k]);
                    _mm512_storeu_ps(out + from + j, sum);
                }
                continue;
            }
            for (int j = 0; j < length; j += 16) {
                const __mmask16 there = first_lanes(length - j);
                __m512 sum = zeros ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(there, out + from + j);
                UNROLL
                for (int k = 0; k < blocks; k++) sum = add_codes(sum, kept[k][quarter] + j, factor[k]);
                _mm512_mask_storeu_ps(out + from + j, there, sum);
            }
        }
    }
}

DECODE5

INLINE void trellis5_step(const uint8_t *codes, size_t stride, int left, int tile_rows, const uint8_t *x, size_t step, int depth,
                          const __m512i *table, __m512i *high, __m512i *low) {
    __m512i row[8], value[4][QUARTERS];
    UNROLL
    for (int e = 0; e < tile_rows + EARLIER5; e++) row[e] = load(codes + (size_t)e * stride, left);
    UNROLL
    for (int i = 0; i < tile_rows; i++) values5(row + i, *table, value[i]);
    multiply_add(value, tile_rows, x, step, depth, high, low);
}

INLINE void trellis5_short_step(const uint8_t *codes, size_t stride, int left, int tile_rows, const uint8_t *x, size_t step,
                                int depth, const __m512i *table, __m512i *high, __m512i *low) {
    __m512i row[8], value[4];
    load_short(codes, stride, left, tile_rows + EARLIER5, row);
    UNROLL
    for (int i = 0; i < tile_rows; i++) value[i] = values5_short(row + i, *table);
    multiply_add_short(value, tile_rows, x, step, depth, high, low);
}

typedef void step_of_tile(const uint8_t *, size_t, int, int, const uint8_t *, size_t, int, const __m512i *, __m512i *, __m512i *);

/* Sum a tile by the steps of either kind, which has `earlier` rows above and `tables` registers of values at `values`. */
INLINE void sum_tile(const uint8_t *codes, size_t stride, int width, int tile_rows, const uint8_t *x, size_t step, int depth,
                     int64_t *sums, int rows, step_of_tile *by, step_of_tile *by_short, int earlier, const uint8_t *values,
                     int tables) {
    __m512i high[8], low[8], table[4];
    UNROLL
    for (int k = 0; k < tile_rows * depth; k++) high[k] = low[k] = _mm512_setzero_si512();
    UNROLL
    for (int k = 0; k < tables; k++) table[k] = _mm512_load_si512(values + k * WIDE);
    int b = 0;
    const uint8_t *ahead = codes + (size_t)(tile_rows + earlier) * stride + AHEAD;
    for (; b + WIDE <= width; b += WIDE, x += QUARTERS * OPERAND) {
        prefetch(ahead + tile_rows * b, tile_rows * WIDE);
        by(codes + b, stride, WIDE, tile_rows, x, step, depth, table, high, low);
    }
    prefetch(ahead + tile_rows * b, tile_rows * (width - b));
    if (width - b > 2 * SHORT)
        by(codes + b, stride, width - b, tile_rows, x, step, depth, table, high, low);
    else
        for (; b < width; b += SHORT, x += SHORT)
            by_short(codes + b, stride, width - b, tile_rows, x, step, depth, table, high, low);
    add_sums(high, low, tile_rows, depth, sums, rows);
}

/* Add one row: eight sign bytes, or fewer, mask 64 columns of inputs. */
INLINE void sign_row(const uint8_t *bits, size_t stride, int width, const uint8_t *x, size_t step, int depth, int64_t *sums,
                     int rows) {
    (void)stride;
    __m512i high[8], low[8];
    UNROLL
    for (int o = 0; o < depth; o++) high[o] = low[o] = _mm512_setzero_si512();
    for (int b = 0; b < width; b += 8, x += OPERAND) {
        uint64_t word = 0;
        memcpy(&word, bits + b, width - b < 8 ? (size_t)(width - b) : 8);
        const __m512i value = _mm512_maskz_set1_epi8(_cvtu64_mask64(word), 1);
        UNROLL
        for (int o = 0; o < depth; o++) {
            const uint8_t *at = x + (size_t)o * step;
            high[o] = _mm512_dpbusd_epi32(high[o], value, _mm512_loadu_si512(at));
            low[o] = _mm512_dpbusd_epi32(low[o], value, _mm512_loadu_si512(at + WIDE));
        }
    }
    add_sums(high, low, 1, depth, sums, rows);
}

ROW_BY_ROW(sign)

#define TILE(TALL, DEEP)                                                                                                     \
    static void trellis_##TALL##x##DEEP(TILE_ARGUMENTS) {                                                                    \
        sum_tile(packed, stride, width, TALL, x, step, DEEP, sums, rows, trellis_step, trellis_short_step, EARLIER,          \
                 bstack_table, 4);                                                                                           \
    }
TILE(4, 1)
TILE(4, 2)
TILE(2, 4)
TILE(1, 1)

static void trellis(SUM_ARGUMENTS) {
    for_each_tile(packed, stride, width, rows, x, step, operands, sums, trellis_4x1, trellis_4x2, trellis_2x4, trellis_1x1);
}

#define TILE5(TALL, DEEP)                                                                                                    \
    static void trellis5_##TALL##x##DEEP(TILE_ARGUMENTS) {                                                                   \
        sum_tile(packed, stride, width, TALL, x, step, DEEP, sums, rows, trellis5_step, trellis5_short_step, EARLIER5,       \
                 bstack_table5, 1);                                                                                          \
    }
TILE5(4, 1)
TILE5(4, 2)
TILE5(2, 4)
TILE5(1, 8)
TILE5(1, 1)

static void trellis5(SUM_ARGUMENTS) {
    int o = 0;
    for (; o + 8 <= operands; o += 8)
        for (int i = 0; i < rows; i++)
            trellis5_1x8(packed + (size_t)i * stride, stride, width, x + (size_t)o * step, step,
                         sums + (size_t)o * (size_t)rows + i, rows);
    for_each_tile(packed, stride, width, rows, x + (size_t)o * step, step, operands - o, sums + (size_t)o * (size_t)rows,
                  trellis5_4x1, trellis5_4x2, trellis5_2x4, trellis5_1x1);
}

#define ALL                                                                                                              \
    .whole = 1, .floats = 16, .arrange = arrange, .trellis = trellis, .trellis5 = trellis5, .sign = sign, .spqr = &bstack_spqr_avx512, \
    .encoder = &bstack_encoder_avx512, .decode = decode, .decode5 = decode5

const struct kernels bstack_avx512 = {.name = "avx512", ALL};
#ifdef BSTACK_AMX
const struct kernels bstack_amx = {.name = "amx", ALL, .trellis5_tiles = bstack_amx_trellis5, .place = bstack_amx_place, .begin = bstack_amx_begin,
                                   .end = bstack_amx_end, .feedback = &bstack_feedback_amx};
#endif

END_OF_TARGET
#endif
