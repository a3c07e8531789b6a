/* SpQR with NEON, on every 64-bit ARM: a lane is a row, four rows at a time. */
#include "kernels.h"

#ifdef BSTACK_NEON
#include <arm_neon.h>
enum { ROWS = 4 };
#include "spqr_rows.h"

INLINE void unpack(const uint8_t *subtile, int bits, int part, codes *code) {
    const uint8_t *at = subtile + 16 * part;
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
            const uint8_t *third = subtile + 64 + 8 * j + 2 * part;
            const uint8x16_t set = vcombine_u8(vtst_u8(vdup_n_u8(third[0]), one), vtst_u8(vdup_n_u8(third[1]), one));
            const uint8x16_t low = vandq_u8(all, vdupq_n_u8(3));
            code[j] = vreinterpretq_s8_u8(vorrq_u8(low, vandq_u8(set, vdupq_n_u8(4))));
            all = vshrq_n_u8(all, 2);
        }
    }
}

/* Multiply with one plane of the inputs. A sum of four products stays below 2^15. */
INLINE int32x4_t plane_product(const codes *code, const uint8_t *plane) {
    int16x8_t low = vdupq_n_s16(0), high = low;
    UNROLL
    for (int j = 0; j < QUADS; j++) {
        const int8x16_t x = vreinterpretq_s8_u32(vdupq_n_u32(load_32(plane + 4 * j)));
        low = vmlal_s8(low, vget_low_s8(code[j]), vget_low_s8(x));
        high = vmlal_high_s8(high, code[j], x);
    }
    return vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high));
}

INLINE words product_of(const codes *code, const uint8_t *planes) {
    return vshlq_n_s32(plane_product(code, planes), 8) + plane_product(code, planes + TILE);
}

/* Compute start + slope times the 3-bit fields of rows 4 part to 4 part + 3. */
INLINE floats statistic(const uint8_t *at, int part, float start, float slope) {
    static const int32_t shift[ROWS] = {0, -3, -6, -9};
    const uint32x4_t word = vdupq_n_u32(load_32(at + 3 * (part / 2)) >> 12 * (part % 2));
    const uint32x4_t field = vandq_u32(vshlq_u32(word, vld1q_s32(shift)), vdupq_n_u32(7));
    return start + slope * vcvtq_f32_u32(field);
}

INLINE void statistics(const uint8_t *at, int part, floats *scale, floats *zero) {
    *scale = statistic(at, part, half_to_float(at + 12), half_to_float(at + 14));
    *zero = statistic(at + 6, part, half_to_float(at + 16), half_to_float(at + 18));
}

INLINE floats to_floats(words numbers) { return vcvtq_f32_s32(numbers); }

INLINE void add_products(const uint8_t *value, const int16_t *given, floats *lanes) {
    UNROLL
    for (int k = 0; k < LANES / ROWS; k++) {
        const float32x4_t factor = vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(value + 8 * k)));
        lanes[k] += factor * vcvtq_f32_s32(vmovl_s16(vld1_s16(given + 4 * k)));
    }
}

INLINE float sum_lanes(const floats *lanes) {
    const float32x4_t four = (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
    const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}

const struct spqr_kernels bstack_spqr_neon = {dense, outliers};

#endif
