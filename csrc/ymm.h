/* The kernels of 256-bit registers; avx2.c, avxvnni.c and avx512bw.c compile them for their instruction sets, each with NAME, KERNELS,
 * and 0 or 1 for
 *   DOTS:  four products of bytes are summed by one instruction (VNNI);
 *   MASKS: AVX-512BW and VL in 256 bits, whose masks merge look-ups and whose logic takes three inputs.
 *
 * Inputs are arranged for each 32 codes. Without DOTS: the even ones, then the odd ones, as bytes do when taken from words. With
 * DOTS: high bytes, then low bytes, both signed, code = 256 high + low.
 */
#ifdef BSTACK_X86
enum {
    WIDE = 32,
#if DOTS
    PLANES = 2,      /* sums of an operand: with its high and its low bytes */
    FLUSH = SEGMENT, /* code bytes after which 32-bit lanes are emptied */
#else
    PLANES = 1,
    FLUSH = 8 * GROUP, /* 256 products of 255 and X_LIMIT fit */
#endif
};

static void arrange(int16_t *x, size_t groups) {
    for (size_t i = 0; i < 2 * groups; i++, x += WIDE) {
#if DOTS
        int8_t first[WIDE], second[WIDE];
        for (int j = 0; j < WIDE; j++) {
            second[j] = (int8_t)x[j];
            first[j] = (int8_t)((x[j] - second[j]) / 256);
        }
#else
        int16_t first[WIDE / 2], second[WIDE / 2];
        for (int j = 0; j < WIDE / 2; j++) {
            first[j] = x[2 * j];
            second[j] = x[2 * j + 1];
        }
#endif
        memcpy(x, first, sizeof first);
        memcpy(x + WIDE / 2, second, sizeof second);
    }
}

/* Take the bits of a where the mask is set, of b elsewhere. */
INLINE __m256i select_bits(__m256i mask, __m256i a, __m256i b) {
#if MASKS
    return _mm256_ternarylogic_epi64(mask, a, b, 0xCA);
#else
    return _mm256_or_si256(_mm256_and_si256(mask, a), _mm256_andnot_si256(mask, b));
#endif
}

/* Look up the values of windows: table k holds those with the high half byte k, and blends choose the table bit by bit. A
 * blend reads the top bit of each byte, so the bits of the window are moved there. */
INLINE __m256i look_up(__m256i window) {
    const __m256i low = _mm256_and_si256(window, _mm256_set1_epi8(0x0F));
    const __m256i bit4 = _mm256_slli_epi16(window, 3), bit5 = _mm256_slli_epi16(window, 2);
    const __m256i bit6 = _mm256_slli_epi16(window, 1);
    __m256i eighth[2], quarter[2], half[2];
    UNROLL
    for (int k = 0; k < 16; k += 2) { /* depth first: few registers are needed at a time */
        const __m256i even = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *)(bstack_table + 16 * k)));
        const __m256i odd = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *)(bstack_table + 16 * k + 16)));
        eighth[k / 2 & 1] = _mm256_blendv_epi8(_mm256_shuffle_epi8(even, low), _mm256_shuffle_epi8(odd, low), bit4);
        if (k & 2) quarter[k / 4 & 1] = _mm256_blendv_epi8(eighth[0], eighth[1], bit5);
        if ((k & 6) == 6) half[k / 8] = _mm256_blendv_epi8(quarter[0], quarter[1], bit6);
    }
    return _mm256_blendv_epi8(half[0], half[1], window);
}

/* Add 32 values times inputs to the PLANES sums of an operand. */
INLINE void multiply_add(__m256i *sum, __m256i value, const uint8_t *x) {
    const __m256i first = _mm256_loadu_si256((const __m256i *)x), second = _mm256_loadu_si256((const __m256i *)(x + WIDE));
#if DOTS
    sum[0] = _mm256_dpbusd_avx_epi32(sum[0], value, first);
    sum[1] = _mm256_dpbusd_avx_epi32(sum[1], value, second);
#else
    const __m256i even = _mm256_and_si256(value, _mm256_set1_epi16(0xFF)), odd = _mm256_srli_epi16(value, 8);
    sum[0] = _mm256_add_epi32(sum[0], _mm256_madd_epi16(even, first));
    sum[0] = _mm256_add_epi32(sum[0], _mm256_madd_epi16(odd, second));
#endif
}

/* Sum the lanes of an operand, two and two, in 64 bits. */
INLINE __m256i wide_sum(const __m256i *sum) {
    __m256i of[2];
    UNROLL
    for (int k = 0; k < PLANES; k++) {
        const __m256i low = _mm256_cvtepi32_epi64(_mm256_castsi256_si128(sum[k]));
        of[k] = _mm256_add_epi64(low, _mm256_cvtepi32_epi64(_mm256_extracti128_si256(sum[k], 1)));
    }
    return PLANES == 1 ? of[0] : _mm256_add_epi64(_mm256_slli_epi64(of[0], 8), of[PLANES - 1]);
}

/* Add the sums of 1, 2, 4 or 8 operands, which are `rows` apart. */
INLINE void add_sums(const __m256i *sum, int depth, int64_t *sums, int rows) {
    UNROLL
    for (int o = 0; o < depth; o += 4) {
        __m256i of[4];
        UNROLL
        for (int e = 0; e < 4; e++) of[e] = o + e < depth ? wide_sum(sum + (o + e) * PLANES) : _mm256_setzero_si256();
        const __m256i ab = _mm256_add_epi64(_mm256_unpacklo_epi64(of[0], of[1]), _mm256_unpackhi_epi64(of[0], of[1]));
        const __m256i cd = _mm256_add_epi64(_mm256_unpacklo_epi64(of[2], of[3]), _mm256_unpackhi_epi64(of[2], of[3]));
        int64_t total[4];
        _mm256_storeu_si256((__m256i *)total, _mm256_add_epi64(_mm256_permute2x128_si256(ab, cd, 0x20),
                                                               _mm256_permute2x128_si256(ab, cd, 0x31)));
        UNROLL
        for (int e = 0; e < 4; e++)
            if (o + e < depth) sums[(size_t)(o + e) * (size_t)rows] += total[e];
    }
}

/* Add a register of code bytes of one row: 128 columns, 32 of each quarter. */
INLINE void trellis_register(const uint8_t *codes, size_t stride, const uint8_t *x, size_t step, int depth, __m256i *sum) {
    const __m256i crumbs = _mm256_set1_epi8(0x33), nibble = _mm256_set1_epi8(0x0F);
    __m256i row[EARLIER + 1], even[2], odd[2];
    UNROLL
    for (int e = 0; e <= EARLIER; e++) row[e] = _mm256_loadu_si256((const __m256i *)(codes + (size_t)e * stride));
    UNROLL
    for (int e = 0; e < 2; e++) { /* of two rows: codes of quarters 0 and 2, and of 1 and 3, the older row's in the higher bits */
        even[e] = select_bits(crumbs, row[2 * e + 1], _mm256_slli_epi16(row[2 * e], 2));
        odd[e] = select_bits(crumbs, _mm256_srli_epi16(row[2 * e + 1], 2), row[2 * e]);
    }
    const __m256i window[QUARTERS] = {
        select_bits(nibble, even[1], _mm256_slli_epi16(even[0], 4)),
        select_bits(nibble, odd[1], _mm256_slli_epi16(odd[0], 4)),
        select_bits(nibble, _mm256_srli_epi16(even[1], 4), even[0]),
        select_bits(nibble, _mm256_srli_epi16(odd[1], 4), odd[0]),
    };
    UNROLL
    for (int quarter = 0; quarter < QUARTERS; quarter++) {
        const __m256i value = look_up(window[quarter]);
        UNROLL
        for (int o = 0; o < depth; o++)
            multiply_add(sum + o * PLANES, value, x + (size_t)o * step + (size_t)quarter * OPERAND);
    }
}

INLINE void trellis_step(const uint8_t *codes, size_t stride, int registers, const uint8_t *x, size_t step, int depth,
                         const __m256i *table, __m256i *sum) {
    (void)table;
    UNROLL
    for (int k = 0; k < registers; k++) trellis_register(codes + k * WIDE, stride, x + k * 2 * WIDE, step, depth, sum);
}

/* A register of code bytes of a row of a trellis5 block gives an index for each quarter, and each index 32 values. With y = c0 ^ c2 ^
 * c4, first = c1 and third = c3, a half byte of the index is first + 4 y, and third chooses among four tables of 16. */
#if MASKS
struct index {
    __m256i low, third;
};

INLINE void load_tables(__m256i *table) {
    UNROLL
    for (int k = 0; k < 4; k++)
        table[k] = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *)(bstack_table5 + 16 * k)));
}

INLINE void index5(const __m256i *row, struct index *index) {
    const __m256i crumbs = _mm256_set1_epi8(0x33), nibble = _mm256_set1_epi8(0x0F);
    const __m256i mixed = _mm256_ternarylogic_epi64(row[4], row[2], row[0], 0x96);
    const __m256i even = select_bits(crumbs, row[3], _mm256_slli_epi16(mixed, 2)); /* quarters 0 and 2 */
    const __m256i odd = select_bits(crumbs, _mm256_srli_epi16(row[3], 2), mixed);  /* quarters 1 and 3 */
    UNROLL
    for (int quarter = 0; quarter < QUARTERS; quarter++) {
        const __m256i both = quarter & 1 ? odd : even;
        index[quarter].low = _mm256_and_si256(quarter & 2 ? _mm256_srli_epi16(both, 4) : both, nibble);
        index[quarter].third = row[1];
    }
}

INLINE __m256i value5(const __m256i *table, struct index index, int quarter) {
    const __mmask32 bit0 = _mm256_test_epi8_mask(index.third, _mm256_set1_epi8((char)(1 << 2 * quarter)));
    const __mmask32 bit1 = _mm256_test_epi8_mask(index.third, _mm256_set1_epi8((char)(2 << 2 * quarter)));
    const __m256i lower = _mm256_mask_shuffle_epi8(_mm256_shuffle_epi8(table[0], index.low), bit0, table[1], index.low);
    const __m256i upper = _mm256_mask_shuffle_epi8(_mm256_shuffle_epi8(table[2], index.low), bit0, table[3], index.low);
    return _mm256_mask_mov_epi8(lower, bit1, upper);
}
#else
struct index {
    __m256i both; /* third in the top two bits; the two below are anything */
};

/* A shuffle gives 0 where the top bit of its index byte is set. With third in the two top bits, this is so of 2 and 3, of 1 and 2
 * once 1 is added to third, of all but 0 in the union of both, of 0 and 1 in the complement: four tables, XORs of those of 16
 * values, whose results give the value by XOR. Blends would take three operations each on recent processors. */
INLINE void load_tables(__m256i *table) {
    __m256i of[4];
    UNROLL
    for (int k = 0; k < 4; k++)
        of[k] = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *)(bstack_table5 + 16 * k)));
    table[0] = of[1];
    table[1] = _mm256_xor_si256(of[2], of[3]);
    table[2] = _mm256_xor_si256(_mm256_xor_si256(of[0], of[1]), table[1]);
    table[3] = of[2];
}

/* Exchange the bits of b under the mask and those of a that are `shift` higher. */
INLINE void exchange(__m256i *a, __m256i *b, int shift, __m256i mask) {
    const __m256i differ = _mm256_and_si256(_mm256_xor_si256(_mm256_srli_epi16(*a, shift), *b), mask);
    *b = _mm256_xor_si256(*b, differ);
    *a = _mm256_xor_si256(*a, _mm256_slli_epi16(differ, shift));
}

INLINE void index5(const __m256i *row, struct index *index) {
    const __m256i crumbs = _mm256_set1_epi8(0x33);
    const __m256i mixed = _mm256_xor_si256(_mm256_xor_si256(row[4], row[2]), row[0]);
    __m256i part[QUARTERS] = {row[3], mixed, _mm256_srli_epi16(row[3], 4), row[1]}; /* crumbs, to be transposed */
    exchange(part + 1, part + 3, 4, _mm256_set1_epi8(0x0F));
    exchange(part, part + 1, 2, crumbs);
    exchange(part + 2, part + 3, 2, crumbs);
    UNROLL
    for (int quarter = 0; quarter < QUARTERS; quarter++) index[quarter].both = part[quarter];
}

INLINE __m256i value5(const __m256i *table, struct index index, int quarter) {
    (void)quarter;
    const __m256i next = _mm256_add_epi8(index.both, _mm256_set1_epi8(0x40));
    const __m256i a = _mm256_shuffle_epi8(table[0], index.both), b = _mm256_shuffle_epi8(table[1], next);
    const __m256i c = _mm256_shuffle_epi8(table[2], _mm256_or_si256(index.both, next));
    const __m256i d = _mm256_shuffle_epi8(table[3], _mm256_xor_si256(index.both, _mm256_set1_epi8((char)0x80)));
    return _mm256_xor_si256(_mm256_xor_si256(a, b), _mm256_xor_si256(c, d));
}
#endif

INLINE void index_of_row(const uint8_t *codes, size_t stride, struct index *index) {
    __m256i row[EARLIER5 + 1];
    UNROLL
    for (int e = 0; e <= EARLIER5; e++) row[e] = _mm256_loadu_si256((const __m256i *)(codes + (size_t)e * stride));
    index5(row, index);
}

/* One or two registers of code bytes of one row, 128 columns each. The indices of both come first, so that the processor finds more
 * that it can do at once. */
INLINE void trellis5_step(const uint8_t *codes, size_t stride, int registers, const uint8_t *x, size_t step, int depth,
                          const __m256i *table, __m256i *sum) {
    struct index index[2][QUARTERS];
    UNROLL
    for (int k = 0; k < registers; k++) index_of_row(codes + k * WIDE, stride, index[k]);
    UNROLL
    for (int k = 0; k < registers; k++)
        UNROLL
        for (int quarter = 0; quarter < QUARTERS; quarter++) {
            const __m256i value = value5(table, index[k][quarter], quarter);
            UNROLL
            for (int o = 0; o < depth; o++)
                multiply_add(sum + o * PLANES, value, x + (size_t)o * step + (size_t)(quarter * OPERAND + k * 2 * WIDE));
        }
}

typedef void step_of_row(const uint8_t *, size_t, int, const uint8_t *, size_t, int, const __m256i *, __m256i *);

/* One row, by steps of either kind, which has `earlier` rows above. */
INLINE void sum_row(const uint8_t *codes, size_t stride, int width, const uint8_t *x, size_t step, int depth, int64_t *sums,
                    int rows, step_of_row *by, int earlier) {
    __m256i table[4];
    load_tables(table);
    for (int start = 0; start < width; start += FLUSH) {
        const int stop = start + FLUSH < width ? start + FLUSH : width;
        __m256i sum[8 * PLANES];
        UNROLL
        for (int o = 0; o < depth * PLANES; o++) sum[o] = _mm256_setzero_si256();
        int b = start;
        for (; depth <= 4 && b + 2 * WIDE <= stop; b += 2 * WIDE) by(codes + b, stride, 2, inputs_of(x, b), step, depth, table, sum);
        for (; b + WIDE <= stop; b += WIDE) by(codes + b, stride, 1, inputs_of(x, b), step, depth, table, sum);
        if (b < stop) {
            uint8_t rest[(EARLIER5 + 1) * WIDE];
            copy_rest(rest, WIDE, codes + b, stride, stop - b, earlier + 1);
            by(rest, WIDE, 1, inputs_of(x, b), step, depth, table, sum);
        }
        add_sums(sum, depth, sums, rows);
    }
}

INLINE void trellis_row(const uint8_t *codes, size_t stride, int width, const uint8_t *x, size_t step, int depth,
                        int64_t *sums, int rows) {
    sum_row(codes, stride, width, x, step, depth, sums, rows, trellis_step, EARLIER);
}

INLINE void trellis5_row(const uint8_t *codes, size_t stride, int width, const uint8_t *x, size_t step, int depth,
                         int64_t *sums, int rows) {
    sum_row(codes, stride, width, x, step, depth, sums, rows, trellis5_step, EARLIER5);
}

/* Add eight columns of some blocks, to zeros if so asked. */
INLINE void add_eight(const int8_t (*value)[QUARTERS][WIDE], const __m256 *factor, int blocks, int quarter, int j, int zeros,
                      float *to) {
    __m256 sum = zeros ? _mm256_setzero_ps() : _mm256_loadu_ps(to + j);
    UNROLL
    for (int k = 0; k < blocks; k++) {
        const __m256i codes32 = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(value[k][quarter] + j)));
        sum = _mm256_add_ps(sum, _mm256_mul_ps(_mm256_cvtepi32_ps(codes32), factor[k]));
    }
    _mm256_storeu_ps(to + j, sum);
}

/* Rows of `blocks` blocks, added in registers: a column is read and written once. */
INLINE void decode5_blocks(const uint8_t *const *codes, const float *scale, int blocks, int columns, int zeros, float *out) {
    const __m256i offset = _mm256_set1_epi8((char)OFFSET); /* taken away by turning the top bit of each byte */
    const int q = (int)quarter_of(columns);
    __m256i table[4];
    __m256 factor[STACKED];
    load_tables(table);
    UNROLL
    for (int k = 0; k < blocks; k++) factor[k] = _mm256_set1_ps(scale[k]);
    for (int b = 0; b < q; b += WIDE) {
        ALIGNED int8_t value[STACKED][QUARTERS][WIDE];
        UNROLL
        for (int k = 0; k < blocks; k++) {
            uint8_t rest[(EARLIER5 + 1) * WIDE];
            const uint8_t *at = codes[k] + b;
            size_t stride = (size_t)q;
            if (b + WIDE > q) {
                copy_rest(rest, WIDE, at, stride, q - b, EARLIER5 + 1);
                at = rest, stride = WIDE;
            }
            struct index index[QUARTERS];
            index_of_row(at, stride, index);
            UNROLL
            for (int quarter = 0; quarter < QUARTERS; quarter++)
                _mm256_store_si256((__m256i *)value[k][quarter], _mm256_xor_si256(value5(table, index[quarter], quarter), offset));
        }
        for (int quarter = 0; quarter < QUARTERS; quarter++) {
            const int from = quarter * q + b, own = q - b < columns - from ? q - b : columns - from;
            const int length = own < WIDE ? own : WIDE;
            float *to = out + from;
            int j = 0;
            if (length == WIDE) {
                UNROLL
                for (int i = 0; i < WIDE; i += 8) add_eight(value, factor, blocks, quarter, i, zeros, to);
                continue;
            }
            for (; j + 8 <= length; j += 8) add_eight(value, factor, blocks, quarter, j, zeros, to);
            for (; j < length; j++) {
                float sum = zeros ? 0.0f : to[j];
                for (int k = 0; k < blocks; k++) sum += (float)value[k][quarter][j] * scale[k];
                to[j] = sum;
            }
        }
    }
}

DECODE5

/* Add four sign bytes of one row: 32 columns. */
INLINE void sign_step(uint32_t bits, const uint8_t *x, size_t step, int depth, __m256i *sum) {
    const __m256i value = _mm256_and_si256(bytes_of_bits(bits), _mm256_set1_epi8(1));
    UNROLL
    for (int o = 0; o < depth; o++) multiply_add(sum + o * PLANES, value, x + (size_t)o * step);
}

INLINE void sign_row(const uint8_t *bits, size_t stride, int width, const uint8_t *x, size_t step, int depth, int64_t *sums,
                     int rows) {
    (void)stride;
    __m256i sum[8 * PLANES];
    UNROLL
    for (int o = 0; o < depth * PLANES; o++) sum[o] = _mm256_setzero_si256();
    int b = 0;
    uint32_t word;
    for (; b + 4 <= width; b += 4, x += OPERAND / 2) {
        memcpy(&word, bits + b, 4);
        sign_step(word, x, step, depth, sum);
    }
    if (b < width) {
        word = 0;
        memcpy(&word, bits + b, (size_t)(width - b));
        sign_step(word, x, step, depth, sum);
    }
    add_sums(sum, depth, sums, rows);
}

ROW_BY_ROW(trellis)
ROW_BY_ROW(trellis5)
ROW_BY_ROW(sign)

const struct kernels KERNELS = {
    .name = NAME,
    .whole = WIDE,
    .floats = MASKS ? 16 : 8,
    .arrange = arrange,
    .trellis = trellis,
    .trellis5 = trellis5,
    .decode5 = decode5,
    .sign = sign,
    .spqr = &bstack_spqr_avx2,
    .encoder = &bstack_encoder,
};

END_OF_TARGET
#endif
