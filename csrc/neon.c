/* NEON, on every 64-bit ARM: 16 weights are looked up in four tables of 64 values, the most that one instruction indexes. */
#include "tiles.h"

#ifdef BSTACK_NEON
#include <arm_neon.h>

enum {
    WIDE = 16,
    FLUSH = 4 * GROUP, /* code bytes after which 32-bit lanes are emptied: 256 products of 255 and X_LIMIT fit */
};

static void arrange(int16_t *x, size_t groups) {
    (void)x;
    (void)groups;
}

INLINE int32x4_t multiply_add(int32x4_t sum, uint8x16_t value, const uint8_t *x) {
    const int16_t *code = (const int16_t *)x;
    const int16x8_t low = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(value)));
    const int16x8_t high = vreinterpretq_s16_u16(vmovl_high_u8(value));
    const int16x8_t x_low = vld1q_s16(code), x_high = vld1q_s16(code + 8);
    sum = vmlal_s16(sum, vget_low_s16(low), vget_low_s16(x_low));
    sum = vmlal_high_s16(sum, low, x_low);
    sum = vmlal_s16(sum, vget_low_s16(high), vget_low_s16(x_high));
    return vmlal_high_s16(sum, high, x_high);
}

/* Look up windows. An index past a table leaves the value as it is; one below it wraps around and is past it too. */
INLINE uint8x16_t look_up(const uint8x16x4_t *table, uint8x16_t window) {
    uint8x16_t value = vqtbl4q_u8(table[0], window);
    value = vqtbx4q_u8(value, table[1], vsubq_u8(window, vdupq_n_u8(64)));
    value = vqtbx4q_u8(value, table[2], vsubq_u8(window, vdupq_n_u8(128)));
    return vqtbx4q_u8(value, table[3], vsubq_u8(window, vdupq_n_u8(192)));
}

/* Join four codes, the oldest in the top bits: each insertion keeps the bits below. */
INLINE uint8x16_t window_of(uint8x16_t oldest, uint8x16_t older, uint8x16_t old, uint8x16_t newest) {
    return vsliq_n_u8(vsliq_n_u8(vsliq_n_u8(newest, old, 2), older, 4), oldest, 6);
}

/* Add a register of code bytes of one row: 64 columns, 16 of each quarter. */
INLINE void trellis_step(const uint8_t *codes, size_t stride, const uint8_t *x, size_t step, int depth,
                         const uint8x16x4_t *table, int32x4_t *sum) {
    uint8x16_t row[EARLIER + 1];
    UNROLL
    for (int e = 0; e <= EARLIER; e++) row[e] = vld1q_u8(codes + (size_t)e * stride);
    UNROLL
    for (int quarter = 0; quarter < QUARTERS; quarter++) {
        const uint8x16_t value = look_up(table, window_of(row[0], row[1], row[2], row[3]));
        UNROLL
        for (int o = 0; o < depth; o++)
            sum[o] = multiply_add(sum[o], value, x + (size_t)o * step + (size_t)quarter * OPERAND);
        UNROLL
        for (int e = 0; e <= EARLIER; e++) row[e] = vshrq_n_u8(row[e], 2);
    }
}

INLINE void trellis_row(const uint8_t *codes, size_t stride, int width, const uint8_t *x, size_t step, int depth,
                        int64_t *sums, int rows) {
    uint8x16x4_t table[4];
    UNROLL
    for (int k = 0; k < 4; k++) table[k] = vld1q_u8_x4(bstack_table + 64 * k);
    for (int start = 0; start < width; start += FLUSH) {
        const int stop = start + FLUSH < width ? start + FLUSH : width;
        int32x4_t sum[4];
        UNROLL
        for (int o = 0; o < depth; o++) sum[o] = vdupq_n_s32(0);
        int b = start;
        for (; b + WIDE <= stop; b += WIDE) trellis_step(codes + b, stride, inputs_of(x, b), step, depth, table, sum);
        if (b < stop) {
            uint8_t rest[(EARLIER + 1) * WIDE];
            copy_rest(rest, WIDE, codes + b, stride, stop - b);
            trellis_step(rest, WIDE, inputs_of(x, b), step, depth, table, sum);
        }
        UNROLL
        for (int o = 0; o < depth; o++) sums[(size_t)o * (size_t)rows] += vaddlvq_s32(sum[o]);
    }
}

INLINE void sign_row(const uint8_t *bits, size_t stride, int width, const uint8_t *x, size_t step, int depth, int64_t *sums,
                     int rows) {
    (void)stride;
    const uint8x8_t one = vcreate_u8(0x8040201008040201u);
    int32x4_t sum[4];
    UNROLL
    for (int o = 0; o < depth; o++) sum[o] = vdupq_n_s32(0);
    for (int b = 0; b < width; b += 2, x += 2 * WIDE) { /* two sign bytes: 16 columns */
        const uint8x8_t low = vtst_u8(vdup_n_u8(bits[b]), one);
        const uint8x8_t high = vtst_u8(vdup_n_u8(b + 1 < width ? bits[b + 1] : 0), one);
        const uint8x16_t value = vandq_u8(vcombine_u8(low, high), vdupq_n_u8(1));
        UNROLL
        for (int o = 0; o < depth; o++) sum[o] = multiply_add(sum[o], value, x + (size_t)o * step);
    }
    UNROLL
    for (int o = 0; o < depth; o++) sums[(size_t)o * (size_t)rows] += vaddlvq_s32(sum[o]);
}

ROW_BY_ROW(trellis)
ROW_BY_ROW(sign)

const struct kernels bstack_neon = {
    .name = "neon",
    .arrange = arrange,
    .trellis = trellis,
    .sign = sign,
    .spqr = &bstack_spqr_neon,
};

#endif
