/* What the kernels share. The files are compiled as one program, in the order of SOURCES in __init__.py.
 *
 * A matrix is a row of a table: the number of its blocks, then address and form (kind * 256 + rank) of each. A kernel reads the
 * row when it runs, so blocks come and go without new launch parameters. Blocks lie at addresses that are multiples of 4.
 * All block data is read by __ldg or __ldcs, which tests/helpers/cuda_on_cpu.h checks byte by byte.
 */
typedef unsigned char byte;
typedef unsigned short word16;
typedef unsigned int word;

constexpr int THREADS = 128, WARPS = THREADS / 32;
constexpr int CHUNK = 8192; /* columns that a thread block holds in shared memory: the largest Hadamard block that it transforms */
constexpr int SIGN = 3, TRELLIS = 4, SPQR = 5, OUTLIERS = 6, TRELLIS5 = 7;
constexpr int FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2;

#ifdef __CUDACC__
__device__ __forceinline__ float half_to_float(word16 half) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
    return value;
}
__device__ __forceinline__ word16 float_to_half(float value) {
    word16 half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
    return half;
}
#endif

__device__ __forceinline__ word16 float_to_bfloat(float value) {
    const word bits = __float_as_uint(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffu; /* NaN */
    return (word16)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

__device__ __forceinline__ float read_number(const void *at, int type, size_t place) {
    if (type == FLOAT32) return __ldg((const float *)at + place);
    const word16 bits = __ldg((const word16 *)at + place);
    return type == FLOAT16 ? half_to_float(bits) : __uint_as_float((word)bits << 16);
}

__device__ __forceinline__ void write_number(void *at, int type, size_t place, float value) {
    if (type == FLOAT32)
        ((float *)at)[place] = value;
    else
        ((word16 *)at)[place] = type == FLOAT16 ? float_to_half(value) : float_to_bfloat(value);
}

struct __align__(8) Halves {
    word16 at[4];
};

/* Write four numbers at once; `place` is a multiple of 4, and `at` of 16. */
__device__ __forceinline__ void write_four(void *at, int type, size_t place, const float *value) {
    if (type == FLOAT32) {
        const float4 four = {value[0], value[1], value[2], value[3]};
        ((float4 *)at)[place / 4] = four;
        return;
    }
    Halves four;
#pragma unroll
    for (int k = 0; k < 4; k++) four.at[k] = type == FLOAT16 ? float_to_half(value[k]) : float_to_bfloat(value[k]);
    ((Halves *)at)[place / 4] = four;
}

/* Load a number of half precision from any address. */
__device__ __forceinline__ float load_half(const byte *at) {
    if (((size_t)at & 1) == 0) return half_to_float(__ldg((const word16 *)at));
    return half_to_float((word16)(__ldg(at) | __ldg(at + 1) << 8));
}

__device__ __forceinline__ const byte *block_of(const long long *entry, int level) {
    return (const byte *)(size_t)__ldg(entry + 1 + 2 * level);
}

/* Sum N values of each lane over the warp, 32 / N lanes for each value: the result belongs to value lane * N / 32. */
template <int N> __device__ __forceinline__ float fold(float *value, int lane, int step = 16) {
    if constexpr (N == 1) {
        float sum = value[0];
        for (; step; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
        return sum;
    } else {
        const bool upper = lane & step;
#pragma unroll
        for (int i = 0; i < N / 2; i++) {
            const float kept = upper ? value[i + N / 2] : value[i], given = upper ? value[i] : value[i + N / 2];
            value[i] = kept + __shfl_xor_sync(~0u, given, step);
        }
        return fold<N / 2>(value, lane, step / 2);
    }
}

/* Where a product reads and writes: y = x W^T for `tokens` rows of x; `add` adds to what is there. */
struct Product {
    const long long *entry;
    const float *x;
    float *y;
    size_t stride; /* of y */
    int rows, columns, tokens, add;
};

/* Write sums over warps of COUNT tokens x ROWS rows; `sums` holds ROWS * COUNT numbers of each warp. */
template <int ROWS, int COUNT>
__device__ __forceinline__ void write_sums(const Product &product, const float *sums, int row, int token) {
    const int i = threadIdx.x;
    const int r = row + i % ROWS, t = token + i / ROWS;
    if (i >= ROWS * COUNT || r >= product.rows || t >= product.tokens) return;
    float *to = product.y + (size_t)t * product.stride + r;
    float sum = product.add ? *to : 0.0f;
    for (int warp = 0; warp < WARPS; warp++) sum += sums[warp * ROWS * COUNT + i];
    *to = sum;
}
