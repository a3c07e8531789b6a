/* Blocks of kinds trellis and trellis5, which multiply rotated inputs.
 *
 * A thread owns one 32-bit word of each code row: 4 columns of each quarter of the columns. It walks down some rows with the
 * words of the rows above in registers. A few operations on whole words make four windows at a time; then each weight is one
 * look-up and one multiply-add for each token. The table lies in shared memory once for each lane, so that no two lanes of a
 * warp meet in a bank, and one byte permutation turns a window into an address: 256 * window + 4 * lane.
 * Of these 256 bytes the first half is the value of trellis5. The second half holds four values of trellis as bytes, of the
 * windows with the same lower six bits.
 */
constexpr int WINDOWS = 64, OLD = 128;

struct TrellisTable {
    word at[WINDOWS][2][32];
};

/* `values`: those of trellis, 256, then those of trellis5, 64. */
__device__ __forceinline__ void fill(TrellisTable *table, const float *values) {
    for (int i = threadIdx.x; i < WINDOWS * 32; i += THREADS) {
        const int window = i / 32, lane = i % 32;
        word four = 0;
        for (int k = 0; k < 4; k++) four |= ((word)(int)__ldg(values + window + k * WINDOWS) & 255u) << 8 * k;
        table->at[window][0][lane] = __float_as_uint(__ldg(values + 4 * WINDOWS + window));
        table->at[window][1][lane] = four;
    }
    __syncthreads();
}

/* Look up window byte k of a word; `offset` is 4 * lane. */
template <bool FIVE>
__device__ __forceinline__ float look_up(const TrellisTable *table, word windows, int k, word offset) {
    const byte *base = (const byte *)table;
    if (FIVE) return __uint_as_float(*(const word *)(base + __byte_perm(windows, offset, 0x5504 | k << 4)));
    const word four = *(const word *)(base + __byte_perm(windows & 0x3f3f3f3fu, offset + OLD, 0x5504 | k << 4));
    const int upper = windows >> (8 * k + 6) & 3;
    return (float)((int)(four << (24 - 8 * upper)) >> 24);
}

/* Take the bits of a where the mask is set, of b elsewhere. */
__device__ __forceinline__ word select(word a, word b, word mask) { return (a & mask) | (b & ~mask); }

/* Make the windows of four columns of a quarter, a byte each; codes[0] is the row's first code row. */
template <bool FIVE> __device__ __forceinline__ word windows_of(const word *codes, int quarter) {
    const word crumbs = 0x33333333u, nibbles = 0x0f0f0f0fu;
    if (FIVE) {
        const word mixed = codes[4] ^ codes[2] ^ codes[0], first = codes[3], third = codes[1];
        const word low = quarter & 1 ? select(first >> 2, mixed, crumbs) : select(first, mixed << 2, crumbs);
        const word top = quarter == 0 ? third << 4 : quarter == 1 ? third << 2 : quarter == 2 ? third : third >> 2;
        return ((quarter & 2 ? low >> 4 : low) & nibbles) | (top & 0x30303030u);
    }
    const word low = quarter & 1 ? select(codes[3] >> 2, codes[2], crumbs) : select(codes[3], codes[2] << 2, crumbs);
    const word top = quarter & 1 ? select(codes[1] >> 2, codes[0], crumbs) : select(codes[1], codes[0] << 2, crumbs);
    return quarter & 2 ? select(low >> 4, top, nibbles) : select(low, top << 4, nibbles);
}

/* Where a word of a code row lies, and what it holds. WHOLE: the columns are a multiple of 16, so code rows consist of words,
 * and inputs are aligned to 16 bytes. Other matrices take longer: their rows begin at any byte. */
template <bool WHOLE> struct Place {
    int columns, quarter_bytes, words;

    __device__ __forceinline__ explicit Place(int columns)
        : columns(columns), quarter_bytes((columns + 3) / 4), words((quarter_bytes + 3) / 4) {}

    /* Load word w of code row `row`; bytes behind the row's end are zero. */
    __device__ __forceinline__ word codes(const byte *block, int row, int w) const {
        const byte *at = block + (size_t)row * quarter_bytes;
        word found = 0;
        if constexpr (WHOLE)
            found = __ldcs((const word *)at + w);
        else
            for (int k = 0; k < 4; k++)
                if (4 * w + k < quarter_bytes) found |= (word)__ldg(at + 4 * w + k) << 8 * k;
        return found;
    }

    /* Return whether byte k of word w holds a column of a quarter. */
    __device__ __forceinline__ bool there(int w, int quarter, int k) const {
        return WHOLE || (4 * w + k < quarter_bytes && quarter * quarter_bytes + 4 * w + k < columns);
    }

    /* Load the inputs of the columns of word w in a quarter; zeros where there are none. */
    __device__ __forceinline__ void inputs(const float *x, int w, int quarter, float *to) const {
        x += (size_t)quarter * quarter_bytes + 4 * w;
        if constexpr (WHOLE) {
            const float4 four = __ldg((const float4 *)x);
            to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
        } else {
#pragma unroll
            for (int k = 0; k < 4; k++) to[k] = there(w, quarter, k) ? __ldg(x + k) : 0.0f;
        }
    }
};

struct TrellisShared {
    TrellisTable table;
    float sums[WARPS * 32];
    const long long *part; /* the matrix at hand */
    int after;             /* strips of the matrices up to it */
};

/* Return the matrix at hand; read again at each use, because registers are scarce in the loops between. */
__device__ __forceinline__ const long long *part_of(const TrellisShared *shared) {
    return *(const long long *const volatile *)&shared->part;
}

/* Multiply ROWS rows of one block with TOKENS tokens, over the columns of this warp. Of the products, ROWS of each token in turn,
 * lane l returns number l * ROWS * TOKENS / 32. */
template <bool FIVE, bool WHOLE, int ROWS, int TOKENS>
__device__ __forceinline__ float products(const Product &product, const TrellisShared *shared, const byte *block, int row,
                                          int token) {
    const int earlier = FIVE ? 4 : 3, below = (int)__ldg(part_of(shared) + 1) + earlier - row;
    const TrellisTable *table = &shared->table;
    const Place<WHOLE> place(product.columns);
    const word offset = threadIdx.x % 32 * 4;
    float sum[TOKENS * ROWS];
#pragma unroll
    for (int i = 0; i < TOKENS * ROWS; i++) sum[i] = 0.0f;
#pragma unroll 1
    for (int w = threadIdx.x; w < place.words; w += THREADS) {
        word codes[ROWS + earlier];
#pragma unroll
        for (int r = 0; r < ROWS + earlier; r++) codes[r] = r < below ? place.codes(block, row + r, w) : 0;
#pragma unroll
        for (int quarter = 0; quarter < 4; quarter++) {
            float x[TOKENS][4];
#pragma unroll
            for (int t = 0; t < TOKENS; t++) {
                const int given = token + t < product.tokens ? token + t : token; /* any: the sums are not written */
                place.inputs(product.x + (size_t)given * product.columns, w, quarter, x[t]);
            }
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                const word windows = windows_of<FIVE>(codes + r, quarter);
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    const float weight = look_up<FIVE>(table, windows, k, offset);
#pragma unroll
                    for (int t = 0; t < TOKENS; t++) sum[t * ROWS + r] += weight * x[t][k];
                }
            }
        }
    }
    const int lane = threadIdx.x % 32, own = row + lane * ROWS * TOKENS / 32 % ROWS, rows = (int)__ldg(part_of(shared) + 1);
    const byte *scales = block + (size_t)(rows + earlier) * place.quarter_bytes;
    const float scale = own < rows ? load_half(scales + 2 * (size_t)own) : 0.0f;
    return scale * fold<ROWS * TOKENS>(sum, lane);
}

/* Multiply matrices that lie one under the other. `parts` holds, of each, the address of its row of the table, its rows, and those
 * of the matrices above it. A thread block takes strip after strip of ROWS rows, each of one matrix. */
template <bool WHOLE, int ROWS, int TOKENS>
__device__ __forceinline__ void multiply_rotated(const long long *parts, int strips, const Product &product,
                                                 const float *values, TrellisShared *shared) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, token = blockIdx.y * TOKENS, all = ROWS * TOKENS;
    if (threadIdx.x == 0) shared->part = parts - 3, shared->after = 0;
    fill(&shared->table, values);
    for (int strip = blockIdx.x; strip < strips; strip += gridDim.x) {
        if (threadIdx.x == 0)
            while (strip >= shared->after) shared->part += 3, shared->after += ((int)__ldg(shared->part + 1) + ROWS - 1) / ROWS;
        __syncthreads();
        const int last = ((int)__ldg(part_of(shared) + 1) + ROWS - 1) / ROWS;
        const int row = (strip - shared->after + last) * ROWS;
        float sum = 0.0f;
        for (int level = 0;; level++) {
            const long long *entry = (const long long *)(size_t)__ldg(part_of(shared));
            if (level >= (int)__ldg(entry)) break;
            const int kind = (int)__ldg(entry + 2 + 2 * level) / 256;
            const byte *block = block_of(entry, level);
            if (kind == TRELLIS5)
                sum += products<true, WHOLE, ROWS, TOKENS>(product, shared, block, row, token);
            else if (kind == TRELLIS)
                sum += products<false, WHOLE, ROWS, TOKENS>(product, shared, block, row, token);
        }
        if (lane * all % 32 == 0) shared->sums[warp * all + lane * all / 32] = sum;
        __syncthreads();
        Product own = product;
        own.rows = (int)__ldg(part_of(shared) + 1), own.y += __ldg(part_of(shared) + 2);
        write_sums<ROWS, TOKENS>(own, shared->sums, row, token);
        __syncthreads();
    }
}

/* RESIDENT: thread blocks of a multiprocessor, which bound the registers of a thread. */
#define MULTIPLY_ROTATED(NAME, WHOLE, ROWS, TOKENS, RESIDENT)                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)                                                        \
        NAME(const long long *parts, const float *values, const float *x, float *y, long long stride, int strips,          \
             int columns, int tokens, int add) {                                                                           \
        __shared__ TrellisShared shared;                                                                                   \
        const Product product = {0, x, y, (size_t)stride, 0, columns, tokens, add};                                        \
        multiply_rotated<WHOLE, ROWS, TOKENS>(parts, strips, product, values, &shared);                                    \
    }
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
MULTIPLY_ROTATED(multiply_rotated_1, true, 8, 1, 4) /* for 5 it keeps registers in memory */
#else
MULTIPLY_ROTATED(multiply_rotated_1, true, 8, 1, 5)
#endif
MULTIPLY_ROTATED(multiply_rotated_2, true, 8, 2, 4)
MULTIPLY_ROTATED(multiply_rotated_4, true, 8, 4, 3)
MULTIPLY_ROTATED(multiply_rotated_8, true, 4, 8, 3)
MULTIPLY_ROTATED(multiply_rotated_any, false, 8, 1, 4)

/* Add the weights of one row that lie in one word of its code rows: four of each quarter. */
template <bool FIVE, bool WHOLE>
__device__ __forceinline__ void add_weights(const TrellisTable *table, const byte *block, int rows, const Place<WHOLE> &place,
                                            int row, int w, float weight[4][4]) {
    const int earlier = FIVE ? 4 : 3;
    word codes[earlier + 1];
#pragma unroll
    for (int r = 0; r <= earlier; r++) codes[r] = place.codes(block, row + r, w);
    const float scale = load_half(block + (size_t)(rows + earlier) * place.quarter_bytes + 2 * (size_t)row);
#pragma unroll
    for (int quarter = 0; quarter < 4; quarter++) {
        const word windows = windows_of<FIVE>(codes, quarter);
#pragma unroll
        for (int k = 0; k < 4; k++)
            weight[quarter][k] += scale * look_up<FIVE>(table, windows, k, threadIdx.x % 32 * 4);
    }
}

template <bool WHOLE>
__device__ __forceinline__ void decode_rotated(const long long *parts, const long long *index, void *out, int wanted,
                                               int columns, int type, const TrellisTable *table) {
    const Place<WHOLE> place(columns);
    const long long all = (long long)wanted * place.words, step = (long long)gridDim.x * THREADS;
    for (long long i = (long long)blockIdx.x * THREADS + threadIdx.x; i < all; i += step) {
        const long long which = i / place.words;
        const int w = (int)(i % place.words);
        const long long *part = parts, wanted_row = __ldg(index + which);
        while (wanted_row >= __ldg(part + 1) + __ldg(part + 2)) part += 3;
        const long long *entry = (const long long *)(size_t)__ldg(part);
        const int rows = (int)__ldg(part + 1), row = (int)(wanted_row - __ldg(part + 2)), count = (int)__ldg(entry);
        float weight[4][4] = {};
        for (int level = 0; level < count; level++) {
            const int kind = (int)__ldg(entry + 2 + 2 * level) / 256;
            const byte *block = block_of(entry, level);
            if (kind == TRELLIS5)
                add_weights<true>(table, block, rows, place, row, w, weight);
            else if (kind == TRELLIS)
                add_weights<false>(table, block, rows, place, row, w, weight);
        }
#pragma unroll
        for (int quarter = 0; quarter < 4; quarter++) {
            const size_t to = (size_t)which * columns + (size_t)quarter * place.quarter_bytes + 4 * w;
            if constexpr (WHOLE)
                write_four(out, type, to, weight[quarter]);
            else
                for (int k = 0; k < 4; k++)
                    if (place.there(w, quarter, k)) write_number(out, type, to + k, weight[quarter][k]);
        }
    }
}

/* Decode rows index[0] to index[wanted - 1] of matrices that lie one under the other (`multiply_rotated`) to numbers of some
 * type, (wanted, columns). */
#define DECODE_ROTATED(NAME, WHOLE)                                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                                  \
        NAME(const long long *parts, const float *values, const long long *index, void *out, int wanted, int columns,      \
             int type) {                                                                                                   \
        __shared__ TrellisTable table;                                                                                     \
        fill(&table, values);                                                                                              \
        decode_rotated<WHOLE>(parts, index, out, wanted, columns, type, &table);                                           \
    }
DECODE_ROTATED(decode_rotated_words, true)
DECODE_ROTATED(decode_rotated_any, false)
