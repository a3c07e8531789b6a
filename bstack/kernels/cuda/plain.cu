/* Blocks of kinds SpQR, outliers and sign, which multiply the inputs themselves. format/SPEC.md, section 6, has the layouts.
 *
 * A thread block takes the 16 rows of a row tile. For the dense part of SpQR it first brings inputs into the block's order, in
 * shared memory. A subtile, 16 rows by 16 inputs, is then read by one warp: lane r and lane r + 16 hold 8 inputs of row r each.
 */
constexpr int TILE = 16, STATISTICS = 20, RANK = 16, ORDERED = 4096; /* inputs in shared memory */

/* The dense part of an SpQR block. */
struct Dense {
    const word16 *order;
    const byte *tiles;
    int bits, subtiles, groups, tile_bytes;
};

__device__ __forceinline__ Dense dense_of(const byte *block, int rank, int columns) {
    Dense dense;
    dense.order = (const word16 *)block;
    dense.tiles = block + (2 * (size_t)columns + 63) / 64 * 64;
    dense.bits = rank % 16;
    dense.subtiles = rank / 16;
    dense.groups = (columns + 16 * dense.subtiles - 1) / (16 * dense.subtiles);
    dense.tile_bytes = dense.subtiles * dense.bits * 32 + STATISTICS;
    return dense;
}

/* Load 8 codes of a row of a subtile, inputs 8 * half to 8 * half + 7, a byte each. */
__device__ __forceinline__ void load_eight(const byte *subtile, int bits, int row, int half, word *four) {
    if (bits == 4) {
        const word both = __ldg((const word *)(subtile + 64 * half + 4 * row));
        four[0] = both & 0x0f0f0f0fu;
        four[1] = both >> 4 & 0x0f0f0f0fu;
        return;
    }
    const word low = __ldg((const word *)(subtile + 4 * row));
#pragma unroll
    for (int k = 0; k < 2; k++) {
        const word third = __ldg(subtile + 64 + 8 * (2 * half + k) + row / 2) >> 4 * (row & 1) & 15u; /* bit i is for byte i */
        four[k] = (low >> 2 * (2 * half + k) & 0x03030303u) | (third * 0x00204081u & 0x01010101u) << 2;
    }
}

/* Compute scale and zero of a row of a tile. */
__device__ __forceinline__ void load_statistics(const byte *tile, const Dense &dense, int row, float *scale, float *zero) {
    const word *at = (const word *)(tile + dense.tile_bytes - STATISTICS);
    word five[5];
#pragma unroll
    for (int k = 0; k < 5; k++) five[k] = __ldg(at + k);
    const word scales = row < 8 ? five[0] : five[0] >> 24 | five[1] << 8;
    const word zeros = row < 8 ? five[1] >> 16 | five[2] << 16 : five[2] >> 8;
    const int shift = 3 * (row & 7);
    *scale = half_to_float((word16)five[3]) + half_to_float((word16)(five[3] >> 16)) * (float)(scales >> shift & 7u);
    *zero = half_to_float((word16)five[4]) + half_to_float((word16)(five[4] >> 16)) * (float)(zeros >> shift & 7u);
}

struct PlainShared {
    float x[ORDERED];
    float factors[TILE * RANK];
    float sums[WARPS * TILE * 8];
};

/* Add products of a dense part with TOKENS tokens: lanes r and r + 16 of all warps hold parts of row r's. */
template <int TOKENS>
__device__ __forceinline__ void add_dense(const Product &product, const Dense &dense, PlainShared *shared, int row, int token,
                                          float *total) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, span = ORDERED / TOKENS, group = 16 * dense.subtiles;
    for (int start = 0; start < product.columns; start += span) {
        __syncthreads(); /* the inputs before have been used */
        for (int p = threadIdx.x; p < span; p += THREADS) {
            const bool there = start + p < product.columns;
            const int column = there ? __ldg(dense.order + start + p) : 0;
            for (int t = 0; t < TOKENS; t++) {
                const bool given = there && token + t < product.tokens;
                shared->x[t * span + p] = given ? __ldg(product.x + (size_t)(token + t) * product.columns + column) : 0.0f;
            }
        }
        __syncthreads();
        const int stop = min(dense.groups, (start + span) / group);
#pragma unroll 1
        for (int g = start / group + warp; g < stop; g += WARPS) {
            const byte *tile = dense.tiles + ((size_t)(row / TILE) * dense.groups + g) * dense.tile_bytes;
            float scale, zero, sum[TOKENS];
            load_statistics(tile, dense, lane % 16, &scale, &zero);
#pragma unroll
            for (int t = 0; t < TOKENS; t++) sum[t] = 0.0f;
#pragma unroll 1
            for (int s = 0; s < dense.subtiles; s++) {
                word four[2];
                load_eight(tile + s * dense.bits * 32, dense.bits, lane % 16, lane / 16, four);
                const float *x = shared->x + g * group - start + 16 * s + 8 * (lane / 16);
#pragma unroll
                for (int k = 0; k < 8; k++) {
                    const float code = (float)(four[k / 4] >> 8 * (k % 4) & 255u) - zero;
#pragma unroll
                    for (int t = 0; t < TOKENS; t++) sum[t] += code * x[t * span + k];
                }
            }
#pragma unroll
            for (int t = 0; t < TOKENS; t++) total[t] += scale * sum[t];
        }
    }
}

/* Add to lane r the sum over all lanes. */
__device__ __forceinline__ void add_to_lane(float sum, int r, float *total) {
    for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if ((int)threadIdx.x % 32 == r) *total += sum;
}

/* The outliers of a row: their number, inputs and values. */
struct Row {
    word count;
    const word16 *column, *value;
};

__device__ __forceinline__ Row outliers_of(const byte *block, int rows, int row) {
    const word *pointer = (const word *)block;
    const word first = __ldg(pointer + row), all = __ldg(pointer + rows);
    const word16 *columns = (const word16 *)(pointer + rows + 1);
    const Row found = {__ldg(pointer + row + 1) - first, columns + first, columns + all + first};
    return found;
}

/* Add products of outliers: a warp takes a row at a time. */
template <int TOKENS>
__device__ __forceinline__ void add_outliers(const Product &product, const byte *block, int row, int token, float *total) {
    for (int r = threadIdx.x / 32; r < TILE && row + r < product.rows; r += WARPS) {
        const Row outliers = outliers_of(block, product.rows, row + r);
        float sum[TOKENS] = {};
        for (word k = threadIdx.x % 32; k < outliers.count; k += 32) {
            const float value = half_to_float(__ldg(outliers.value + k));
            const float *x = product.x + __ldg(outliers.column + k);
#pragma unroll
            for (int t = 0; t < TOKENS; t++)
                if (token + t < product.tokens) sum[t] += value * __ldg(x + (size_t)(token + t) * product.columns);
        }
#pragma unroll
        for (int t = 0; t < TOKENS; t++) add_to_lane(sum[t], r, total + t);
    }
}

/* A sign block: bits by rows, then factors by rows, then factors by columns. */
struct Sign {
    const byte *bits, *left, *right;
    size_t stride;
    int rank;
};

__device__ __forceinline__ Sign sign_of(const byte *block, int rank, int rows, int columns) {
    const size_t stride = ((size_t)columns + 7) / 8;
    const byte *left = block + rows * stride;
    const Sign sign = {block, left, left + 2 * (size_t)rows * rank, stride, rank};
    return sign;
}

/* Load the factors of some rows into shared memory; zeros behind the last row and the rank. */
__device__ __forceinline__ void load_factors(const Sign &sign, int row, int stop, float *factors) {
    __syncthreads(); /* those before have been used */
    for (int i = threadIdx.x; i < TILE * RANK; i += THREADS) {
        const int r = row + i / RANK, k = i % RANK;
        factors[i] = r < stop && k < sign.rank ? load_half(sign.left + 2 * ((size_t)r * sign.rank + k)) : 0.0f;
    }
    __syncthreads();
}

__device__ __forceinline__ bool negative(const Sign &sign, int row, int column) {
    return !(__ldg(sign.bits + (size_t)row * sign.stride + column / 8) >> column % 8 & 1);
}

/* Add products of a sign block: a warp takes four rows, a lane some columns. */
template <int TOKENS>
__device__ __forceinline__ void add_sign(const Product &product, const Sign &sign, float *factors, int row, int token,
                                         float *total) {
    const int first = threadIdx.x / 32 * 4;
    float sum[4][TOKENS] = {};
    load_factors(sign, row, product.rows, factors);
    for (int column = threadIdx.x % 32; column < product.columns; column += 32) {
        float size[4] = {};
        for (int k = 0; k < sign.rank; k++) {
            const float right = load_half(sign.right + 2 * ((size_t)column * sign.rank + k));
#pragma unroll
            for (int r = 0; r < 4; r++) size[r] += factors[(first + r) * RANK + k] * right;
        }
#pragma unroll
        for (int r = 0; r < 4; r++)
            if (row + first + r < product.rows && negative(sign, row + first + r, column)) size[r] = -size[r];
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
            if (token + t >= product.tokens) continue;
            const float x = __ldg(product.x + (size_t)(token + t) * product.columns + column);
#pragma unroll
            for (int r = 0; r < 4; r++) sum[r][t] += size[r] * x;
        }
    }
#pragma unroll
    for (int i = 0; i < 4 * TOKENS; i++) add_to_lane(sum[i / TOKENS][i % TOKENS], first + i / TOKENS, total + i % TOKENS);
}

template <int TOKENS> __device__ __forceinline__ void multiply_plain(const Product &product, PlainShared *shared) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, token = blockIdx.y * TOKENS;
    const int count = (int)__ldg(product.entry);
    for (int row = blockIdx.x * TILE; row < product.rows; row += gridDim.x * TILE) {
        float total[TOKENS] = {};
        for (int level = 0; level < count; level++) {
            const int form = (int)__ldg(product.entry + 2 + 2 * level), kind = form / 256, rank = form % 256;
            const byte *block = block_of(product.entry, level);
            if (kind == SPQR)
                add_dense<TOKENS>(product, dense_of(block, rank, product.columns), shared, row, token, total);
            else if (kind == OUTLIERS)
                add_outliers<TOKENS>(product, block, row, token, total);
            else if (kind == SIGN)
                add_sign<TOKENS>(product, sign_of(block, rank, product.rows, product.columns), shared->factors, row, token,
                                 total);
        }
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
            total[t] += __shfl_xor_sync(~0u, total[t], 16);
            if (lane < TILE) shared->sums[(warp * TOKENS + t) * TILE + lane] = total[t];
        }
        __syncthreads();
        write_sums<TILE, TOKENS>(product, shared->sums, row, token);
        __syncthreads();
    }
}

#define MULTIPLY_PLAIN(TOKENS)                                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                                  \
        multiply_plain_##TOKENS(const long long *entry, const float *values, const float *x, float *y, long long stride,   \
                                int rows, int columns, int tokens, int add) {                                              \
        __shared__ PlainShared shared;                                                                                     \
        const Product product = {entry, x, y, (size_t)stride, rows, columns, tokens, add};                                 \
        multiply_plain<TOKENS>(product, &shared);                                                                          \
    }
MULTIPLY_PLAIN(1)
MULTIPLY_PLAIN(2)
MULTIPLY_PLAIN(4)
MULTIPLY_PLAIN(8)

/* Decode rows index[0] to index[wanted - 1] to numbers of some type, (wanted, columns). A thread block adds up CHUNK columns of a
 * row in shared memory, block after block, because each SpQR block has its own order of columns; within a block no column comes
 * twice. */
extern "C" __global__ void __launch_bounds__(THREADS)
    decode_plain(const long long *entry, const long long *index, void *out, int wanted, int rows, int columns, int type) {
    __shared__ float factors[TILE * RANK], weights[CHUNK];
    const int start = blockIdx.y * CHUNK, length = min(CHUNK, columns - start), count = (int)__ldg(entry);
    for (int one = blockIdx.x; one < wanted; one += gridDim.x) {
        const int row = (int)__ldg(index + one);
        for (int i = threadIdx.x; i < length; i += THREADS) weights[i] = 0.0f;
        __syncthreads();
        const auto add = [&](int column, float weight) {
            if (column >= start && column < start + length) weights[column - start] += weight;
        };
        for (int level = 0; level < count; level++) {
            const int form = (int)__ldg(entry + 2 + 2 * level), kind = form / 256, rank = form % 256;
            const byte *block = block_of(entry, level);
            if (kind == SPQR) {
                const Dense dense = dense_of(block, rank, columns);
                for (int p = 8 * threadIdx.x; p < columns; p += 8 * THREADS) {
                    const int subtile = p / TILE;
                    const size_t group = (size_t)(row / TILE) * dense.groups + subtile / dense.subtiles;
                    const byte *tile = dense.tiles + group * dense.tile_bytes;
                    float scale, zero;
                    word four[2];
                    load_statistics(tile, dense, row % TILE, &scale, &zero);
                    load_eight(tile + subtile % dense.subtiles * dense.bits * 32, dense.bits, row % TILE, p / 8 % 2, four);
                    for (int k = 0; k < 8 && p + k < columns; k++)
                        add(__ldg(dense.order + p + k), scale * ((float)(four[k / 4] >> 8 * (k % 4) & 255u) - zero));
                }
            } else if (kind == OUTLIERS) {
                const Row outliers = outliers_of(block, rows, row);
                for (word k = threadIdx.x; k < outliers.count; k += THREADS)
                    add(__ldg(outliers.column + k), half_to_float(__ldg(outliers.value + k)));
            } else if (kind == SIGN) {
                const Sign sign = sign_of(block, rank, rows, columns);
                load_factors(sign, row, row + 1, factors);
                for (int column = start + threadIdx.x; column < start + length; column += THREADS) {
                    float size = 0.0f;
                    for (int k = 0; k < rank; k++)
                        size += factors[k] * load_half(sign.right + 2 * ((size_t)column * rank + k));
                    add(column, negative(sign, row, column) ? -size : size);
                }
            }
            __syncthreads();
        }
        for (int i = threadIdx.x; i < length; i += THREADS)
            write_number(out, type, (size_t)one * columns + start + i, weights[i]);
        __syncthreads();
    }
}
