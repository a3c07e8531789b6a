/* Shared by the parts of the library: what an instruction set implements, and helpers of all of them. */
#ifndef BSTACK_KERNELS_H
#define BSTACK_KERNELS_H

#include "bstack.h"

#if !defined(__GNUC__) || defined(_WIN32)
#error "the kernels need GCC or Clang on a POSIX system; without them bstack uses its numpy reference"
#endif
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the kernels need a little-endian machine"
#endif

#include <string.h>

enum {
    GROUP = 64,        /* columns whose codes are arranged together */
    OPERAND = 128,     /* bytes of an arranged group */
    QUARTERS = 4,      /* columns b, b + q, b + 2 q, b + 3 q share code byte b of a trellis row */
    EARLIER = 3,       /* rows of codes above the first of a trellis block */
    EARLIER5 = 4,      /* of a trellis5 block */
    SEGMENT = 8192,    /* code bytes or sign bytes summed in one call, so that no 32-bit lane overflows */
    NARROW = 512,      /* code bytes for five operands and more, whose inputs then fit the nearest cache */
    X_LIMIT = 32639,   /* largest code of a trellis block's input: as 256 high + low, both are signed bytes */
    SIGN_LIMIT = 8159, /* of a sign block's input: a sum of four is below X_LIMIT */
    STACKED = 4,      /* blocks of a row that are decoded together, at most */
    OFFSET = 128,      /* table values are stored with this added, as unsigned bytes */
};

/* One instruction set. `x` are operands: rows of inputs as 16-bit codes, `step` bytes apart, in groups of 64 in the
 * instruction set's own order, which `arrange` makes. Both sums are exact and are added to sums[k * rows + i]. */
struct kernels {
    const char *name;
    /* Code bytes that are read together; a row whose width is no multiple of them takes longer. 1 where any width will do. */
    int whole;
    /* Bring `groups` groups of 64 codes, at x, into order, in place. */
    void (*arrange)(int16_t *x, size_t groups);
    /* Floats of a register, for dense.c; 0 where it has plain loops. */
    int floats;
    /* Sum over columns j of (OFFSET + T[w_ij]) x_kj. Code row i - 3 + e starts at codes + (i + e) * stride, of which
     * `width` bytes are used; groups of operands follow the order of the code bytes, four quarters in turn. */
    void (*trellis)(const uint8_t *codes, size_t stride, int width, int rows, const uint8_t *x, size_t step, int operands,
                    int64_t *sums);
    /* The same for trellis5 blocks: code row i - 4 + e starts at codes + (i + e) * stride. */
    void (*trellis5)(const uint8_t *codes, size_t stride, int width, int rows, const uint8_t *x, size_t step, int operands,
                     int64_t *sums);
    /* Null, or the same for operands that stand in tiles, for rows of any number; `place` puts operand number k,
     * arranged, there. */
    void (*trellis5_tiles)(const uint8_t *codes, size_t stride, int width, int rows, const uint8_t *tiles, int operands,
                           int64_t *sums);
    void (*place)(const uint8_t *codes, size_t groups, int k, int operands, uint8_t *tiles);
    void (*begin)(int operands), (*end)(void); /* before and after some of these sums, in their thread */
    /* Sum over columns j with sign bit 1 of x_kj. Row i starts at bits + i * stride. Groups of operands follow the
     * order of the columns. */
    void (*sign)(const uint8_t *bits, size_t stride, int width, int rows, const uint8_t *x, size_t step, int operands,
                 int64_t *sums);
    /* Add scale * T[w_j] to out[j] for the columns j of one row, whose code rows start at codes; null: decode.c uses its
     * plain loop. */
    void (*decode)(const uint8_t *codes, int columns, float scale, float *out);
    /* The same for up to STACKED trellis5 blocks, added in their order; to zeros, whatever out holds, if so asked. */
    void (*decode5)(const uint8_t *const *codes, const float *scale, int blocks, int columns, int zeros, float *out);
    const struct spqr_kernels *spqr; /* spqr.h */
    const struct encoder *encoder;   /* encode.h */
    const struct feedback *feedback; /* feedback.h; null: floats are as fast */
};

struct spqr_kernels;
struct encoder;
struct feedback;
extern const struct kernels bstack_portable;
extern const struct spqr_kernels bstack_spqr_portable;
extern const struct encoder bstack_encoder;
#if defined(__x86_64__)
#define BSTACK_X86 1
extern const struct kernels bstack_avx2, bstack_avx512bw, bstack_avx512;
#if defined(__clang__) ? __clang_major__ >= 13 : __GNUC__ >= 11 /* older ones do not know it */
#define BSTACK_AVXVNNI 1
extern const struct kernels bstack_avxvnni;
#ifdef __linux__ /* which must be asked before tiles are used */
#define BSTACK_AMX 1
extern const struct kernels bstack_amx;
void bstack_amx_begin(int operands), bstack_amx_end(void);
void bstack_amx_place(const uint8_t *codes, size_t groups, int operand, int operands, uint8_t *tiles);
void bstack_amx_trellis5(const uint8_t *codes, size_t stride, int width, int rows, const uint8_t *tiles, int operands, int64_t *sums);
extern const struct feedback bstack_feedback_amx;
#endif
#endif
extern const struct spqr_kernels bstack_spqr_avx2, bstack_spqr_avx512;
extern const struct encoder bstack_encoder_avx512;
#elif defined(__aarch64__)
#define BSTACK_NEON 1
extern const struct kernels bstack_neon;
extern const struct spqr_kernels bstack_spqr_neon;
#endif
const struct kernels *bstack_kernels(void);

#define ALIGNED __attribute__((aligned(64)))
/* Compile a function as part of its caller, for the caller's instruction set. */
#define INLINE static inline __attribute__((always_inline))
/* Unroll the loop that follows. */
#define UNROLL _Pragma("GCC unroll 16")

/* Bytes of a tile: a group of four operands, or of eight where there are more. */
INLINE size_t tile_bytes(int operands) { return OPERAND * (operands > 4 ? 8u : 4u); }

/* Compile a function of plain loops for wider registers too; the loader takes the version for the CPU. This needs the ifunc
 * mechanism, which glibc has and musl lacks. Results do not depend on it: sums of floats keep their order, and nothing is
 * contracted. */
#if defined(BSTACK_X86) && defined(__GLIBC__)
#define EACH_CPU __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define EACH_CPU
#endif

/* OFFSET + T of SPEC.md, section 6, of trellis and of trellis5 blocks. */
ALIGNED extern const uint8_t bstack_table[256], bstack_table5[64];

/* Copy a matrix as it is now. Blocks below the count do not change during a call, so one reading of the count is enough. */
static inline void bstack_copy_matrix(struct bstack_matrix *taken, const struct bstack_matrix *matrix) {
    const int32_t count = __atomic_load_n(&matrix->count, __ATOMIC_ACQUIRE);
    taken->rows = matrix->rows;
    taken->columns = matrix->columns;
    taken->count = count;
    memcpy(taken->kind, matrix->kind, (size_t)count);
    memcpy(taken->rank, matrix->rank, (size_t)count);
    memcpy(taken->block, matrix->block, sizeof *taken->block * (size_t)count);
}

/* Convert half precision, little-endian, to single, exactly. */
static inline float half_to_float(const uint8_t *at) {
    uint16_t half;
    memcpy(&half, at, 2);
    const uint32_t sign = (uint32_t)(half & 0x8000u) << 16, rest = half & 0x7fffu;
    /* Read the exponent as single precision's, then multiply by 2^112: correct for subnormal halves too. */
    uint32_t bits = rest << 13;
    float value;
    memcpy(&value, &bits, 4);
    value *= 0x1p112f;
    memcpy(&bits, &value, 4);
    bits |= sign | (rest >= 0x7c00u ? 0x7f800000u : 0u); /* infinity and NaN */
    memcpy(&value, &bits, 4);
    return value;
}

/* Rows of codes above the first; 0 for kinds that are not of trellis blocks. */
static inline int earlier_rows(int kind) { return kind == BSTACK_TRELLIS ? EARLIER : kind == BSTACK_TRELLIS5 ? EARLIER5 : 0; }

/* Compute y = x w, or add it to y, in the calling thread: x is tokens x n, and w n x columns, its rows filled up to whole panels
 * with any numbers that can be read; steps are the floats from one row to the next. */
enum { DENSE_PANEL = 32 };
void bstack_multiply_panels(const float *w, size_t w_step, int columns, const float *x, size_t x_step, int tokens, int n, float *y,
                            size_t y_step, int add);

static inline size_t quarter_of(int columns) { return ((size_t)columns + 3) / 4; }
static inline size_t sign_stride(int columns) { return ((size_t)columns + 7) / 8; }
static inline size_t round_up(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }

#endif
