/* SpQR with NEON, on every 64-bit ARM: a lane is a row, four rows at a time. */
#include "spqr.h"
#include "tiles.h"

#ifdef BSTACK_NEON
#include <arm_neon.h>

enum {
    QUADS = 4, /* inputs of a subtile, four at a time */
    FOUR = 4,  /* rows of a register */
};

/* The codes of four inputs after another of rows 4 k to 4 k + 3. */
INLINE void unpack(const uint8_t *subtile, int bits, int k, int8x16_t *code) {
    const uint8_t *at = subtile + 16 * k;
    if (bits == 4) {
        UNROLL
        for (int h = 0; h < 2; h++) {
            const uint8x16_t both = vld1q_u8(at + 64 * h);
            code[2 * h] = vreinterpretq_s8_u8(vandq_u8(both, vdupq_n_u8(0x0F)));
            code[2 * h + 1] = vreinterpretq_s8_u8(vshrq_n_u8(both, 4));
        }
    } else {
        const uint8x8_t one = vcreate_u8(0x8040201008040201u);
        uint8x16_t all = vld1q_u8(at);
        UNROLL
        for (int j = 0; j < QUADS; j++) {
            const uint8_t *third = subtile + 64 + 8 * j + 2 * k;
            const uint8x16_t set = vcombine_u8(vtst_u8(vdup_n_u8(third[0]), one), vtst_u8(vdup_n_u8(third[1]), one));
            const uint8x16_t low = vandq_u8(all, vdupq_n_u8(3));
            code[j] = vreinterpretq_s8_u8(vorrq_u8(low, vandq_u8(set, vdupq_n_u8(4))));
            all = vshrq_n_u8(all, 2);
        }
    }
}

/* Sums of the products of four rows' codes with a plane of a subtile. Four products stay below 2^15. */
INLINE int32x4_t product_of(const int8x16_t *code, const uint8_t *plane) {
    int16x8_t low = vdupq_n_s16(0), high = low;
    UNROLL
    for (int j = 0; j < QUADS; j++) {
        const int8x16_t x = vreinterpretq_s8_u32(vdupq_n_u32(load_32(plane + 4 * j)));
        low = vmlal_s8(low, vget_low_s8(code[j]), vget_low_s8(x));
        high = vmlal_high_s8(high, code[j], x);
    }
    return vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high));
}

/* start + slope times the 3-bit fields of rows 4 k to 4 k + 3. */
INLINE float32x4_t statistic(const uint8_t *at, int k, float start, float slope) {
    static const int32_t shift[FOUR] = {0, -3, -6, -9};
    const uint32x4_t word = vdupq_n_u32(load_32(at + 3 * (k / 2)) >> 12 * (k % 2));
    const uint32x4_t field = vandq_u32(vshlq_u32(word, vld1q_s32(shift)), vdupq_n_u32(7));
    return vaddq_f32(vdupq_n_f32(start), vmulq_f32(vdupq_n_f32(slope), vcvtq_f32_u32(field)));
}

/* Four rows of a row tile, two tokens at most. */
INLINE void quarter_tile(const struct dense *dense, int bits, int k, const uint8_t *tile, const struct ordered *x, int first,
                         int deep, float *out) {
    const uint8_t *planes = x->planes + (size_t)first * x->step;
    const float *sums = x->sums + (size_t)first * (size_t)dense->groups;
    float32x4_t total[2];
    UNROLL
    for (int t = 0; t < deep; t++) total[t] = vdupq_n_f32(0.0f);
    for (int g = 0; g < dense->groups; g++, sums++) {
        int32x4_t product[2];
        UNROLL
        for (int t = 0; t < deep; t++) product[t] = vdupq_n_s32(0);
        for (int s = 0; s < dense->subtiles; s++, tile += bits * 32, planes += PLANES) {
            int8x16_t code[QUADS];
            unpack(tile, bits, k, code);
            UNROLL
            for (int t = 0; t < deep; t++) {
                const uint8_t *at = planes + (size_t)t * x->step;
                const int32x4_t high = product_of(code, at), low = product_of(code, at + TILE);
                product[t] = vaddq_s32(product[t], vaddq_s32(vshlq_n_s32(high, 8), low));
            }
        }
        const float32x4_t scale = statistic(tile, k, half_to_float(tile + 12), half_to_float(tile + 14));
        const float32x4_t zero = statistic(tile + 6, k, half_to_float(tile + 16), half_to_float(tile + 18));
        tile += STATISTICS;
        UNROLL
        for (int t = 0; t < deep; t++) {
            const float32x4_t sum = vdupq_n_f32(sums[t * dense->groups]);
            const float32x4_t centred = vsubq_f32(vcvtq_f32_s32(product[t]), vmulq_f32(zero, sum));
            total[t] = vaddq_f32(total[t], vmulq_f32(scale, centred));
        }
    }
    UNROLL
    for (int t = 0; t < deep; t++) {
        float *to = out + (first + t) * DIRECT_ROWS + k * FOUR;
        vst1q_f32(to, vaddq_f32(vld1q_f32(to), total[t]));
    }
}

INLINE void row_tile(const struct dense *dense, int bits, const uint8_t *tiles, const struct ordered *x, int tokens, float *out) {
    for (int k = 0; k < TILE / FOUR; k++) {
        int t = 0;
        for (; t + 2 <= tokens; t += 2) quarter_tile(dense, bits, k, tiles, x, t, 2, out);
        for (; t < tokens; t++) quarter_tile(dense, bits, k, tiles, x, t, 1, out);
    }
}

static void dense(const struct dense *dense, const uint8_t *tiles, int tall, const struct ordered *x, int tokens, float *out) {
    for (; tall; tall--, tiles += (size_t)dense->groups * dense->tile_bytes, out += TILE)
        if (dense->bits == 4)
            row_tile(dense, 4, tiles, x, tokens, out);
        else
            row_tile(dense, 3, tiles, x, tokens, out);
}

/* Add the products of 16 outliers to their lanes. */
INLINE void add_products(const uint8_t *value, const int16_t *given, float32x4_t *lanes) {
    UNROLL
    for (int k = 0; k < 4; k++) {
        const float32x4_t factor = vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(value + 8 * k)));
        const float32x4_t x = vcvtq_f32_s32(vmovl_s16(vld1_s16(given + 4 * k)));
        lanes[k] = vaddq_f32(lanes[k], vmulq_f32(factor, x));
    }
}

static void outliers(const uint8_t *pointer, int rows, const uint8_t *value, const int16_t *given, float *out) {
    for (int i = 0; i < rows; i++, pointer += 4) {
        const size_t count = load_32(pointer + 4) - load_32(pointer);
        float32x4_t lanes[4];
        UNROLL
        for (int k = 0; k < 4; k++) lanes[k] = vdupq_n_f32(0.0f);
        size_t k = 0;
        for (; k + LANES <= count; k += LANES) add_products(value + 2 * k, given + k, lanes);
        if (k < count) {
            uint8_t last[2 * LANES] = {0}; /* what is missing adds zeros */
            memcpy(last, value + 2 * k, 2 * (count - k));
            add_products(last, given + k, lanes);
        }
        const float32x4_t four = vaddq_f32(vaddq_f32(lanes[0], lanes[2]), vaddq_f32(lanes[1], lanes[3]));
        const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
        out[i] += vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
        value += 2 * count;
        given += count;
    }
}

const struct spqr_kernels bstack_spqr_neon = {dense, outliers};

#endif
