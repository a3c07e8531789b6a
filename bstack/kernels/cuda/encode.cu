/* The search of the encoder for trellis5 blocks: csrc/encode.c on a GPU, with its operations in its order and never contracted.
 *
 * A column's rows are cut into segments, and a warp searches each. Where two meet, their paths must be in one state: the values
 * of the first rows of a segment depend on the last codes of the one above, and codes of two paths make values that have
 * nothing to do with the targets. So `meet` searches MARGIN rows to each side of such a place and keeps the state there; `search`
 * takes each segment from state to state. With one segment the codes are those of the CPU, bit for bit.
 *
 * Columns follow one another, launch after launch, because both kernels read errors that other warps made.
 *
 * Of the 256 states a lane has those whose low five bits are its number. They lead to the eight states 4 q + c, q = lane and
 * lane + 32, whose costs go to their lanes through shared memory.
 */
constexpr int STATES = 256, EARLIER5 = 4, SEGMENT = 256, MARGIN = 96, SEARCHED = 2;

/* What is given for a group of columns, as bstack_trellis_encode takes it: contiguous columns, all of `rows` rows. Targets get the
 * feedback of the columns before them. `state` is that before the first row of each segment. */
struct Group {
    float *target;
    const float *original, *feedback, *table, *scale, *weight;
    byte *codes;
    float *errors;
    int *state;
    int columns, rows, column, first; /* first: rows of the first segment, where there are several */

    __device__ __forceinline__ int start(int segment) const { return segment ? first + (segment - 1) * SEGMENT : 0; }

    __device__ __forceinline__ byte *code(int of) const { return codes + (size_t)of * (EARLIER5 + rows); }

    /* Compute the error of a row in the column before, whose codes are chosen. */
    __device__ __forceinline__ float last_error(int row) const {
        const byte *from = code(column - 1) + row;
        const int mixed = __ldg(from + 4) ^ __ldg(from + 2) ^ __ldg(from);
        const float value = __ldg(table + (__ldg(from + 3) + 4 * mixed + 16 * __ldg(from + 1)));
        return __fsub_rn(__ldg(original + (size_t)(column - 1) * rows + row), __fmul_rn(__ldg(scale + row), value));
    }

    /* Compute what a row should become, in units of its scale; `keeps` that in its own, and the error of the column before it. */
    __device__ __forceinline__ float wanted(int row, bool keeps) const {
        float *own = target + (size_t)column * rows + row, x = *own;
        for (int k = 0; k < column; k++) {
            float *kept = errors + (size_t)k * rows + row;
            const float error = k == column - 1 ? last_error(row) : __ldg(kept);
            if (keeps && k == column - 1) *kept = error;
            x = __fadd_rn(x, __fmul_rn(__ldg(feedback + (size_t)k * columns + column), error));
        }
        if (keeps) *own = x;
        return __fmul_rn(x, __frcp_rn(__ldg(scale + row)));
    }
};

typedef word16 Back[32];       /* the oldest code on the way to each of a lane's states */
typedef float4 Costs[STATES / 4]; /* by state */

/* Search rows first to last - 1, from a state or, with -1, from any, to a state or the cheapest. Return the state before row `end`;
 * `back` holds last - end rows. With `writes` the codes of rows from `end` on are kept, and above the first row those before it. */
__device__ __forceinline__ int run(const Group &group, int first, int end, int last, int from, int to, bool writes, Back *back,
                                   Costs *costs) {
    const int lane = threadIdx.x % 32;
    float value[2][4], before[8]; /* by half of the states and newest code ^ oldest code; by state / 32 */
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const int q = lane + 32 * h;
            value[h][k] = __ldg(group.table + ((q & 3) + 4 * (k ^ (q >> 2 & 3)) + 16 * (q >> 4)));
        }
#pragma unroll
    for (int k = 0; k < 8; k++) before[k] = from < 0 || from == 32 * k + lane ? 0.0f : __uint_as_float(0x7f800000u);

    for (int chunk = first; chunk < last; chunk += 32) {
        const int mine = chunk + lane;
        const float own_x = mine < last ? group.wanted(mine, writes) : 0.0f;
        const float own_weight = mine < last ? __ldg(group.weight + mine) : 0.0f;
        for (int row = chunk; row < min(chunk + 32, last); row++) {
            const float x = __shfl_sync(~0u, own_x, row - chunk), weight = __shfl_sync(~0u, own_weight, row - chunk);
            float4 *by_four = costs[row & 1];
            word oldest = 0;
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float cost[4], after[4];
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    const float d = __fsub_rn(x, value[h][k]);
                    cost[k] = __fmul_rn(weight, __fmul_rn(d, d));
                }
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    float way[4];
#pragma unroll
                    for (int o = 0; o < 4; o++) way[o] = __fadd_rn(before[h + 2 * o], cost[c ^ o]);
                    /* Of equal costs the lowest code wins, as on the CPU. */
                    const bool low = way[1] < way[0], high = way[3] < way[2];
                    const float below = low ? way[1] : way[0], above = high ? way[3] : way[2];
                    const bool upper = above < below;
                    after[c] = upper ? above : below;
                    oldest |= (word)(upper ? 2 + high : low) << 2 * (4 * h + c);
                }
                const float4 four = {after[0], after[1], after[2], after[3]};
                by_four[lane + 32 * h] = four;
            }
            if (row >= end) back[row - end][lane] = (word16)oldest;
            __syncwarp();
            const float *by_state = (const float *)by_four;
#pragma unroll
            for (int k = 0; k < 8; k++) before[k] = by_state[32 * k + lane];
            if (((row - first) & 15) == 15) { /* keep the sums small, so that single precision is fine enough */
                const float zero = by_state[0];
#pragma unroll
                for (int k = 0; k < 8; k++) before[k] = __fsub_rn(before[k], zero);
            }
        }
    }

    int state = to;
    if (to < 0) {
        float least = before[0];
        state = lane;
#pragma unroll
        for (int k = 1; k < 8; k++)
            if (before[k] < least) least = before[k], state = 32 * k + lane;
        for (int step = 16; step; step /= 2) {
            const float other = __shfl_xor_sync(~0u, least, step);
            const int its = (int)__shfl_xor_sync(~0u, (float)state, step);
            if (other < least || (other == least && its < state)) least = other, state = its;
        }
    }
    byte *code = group.code(group.column) + EARLIER5;
    for (int row = last - 1; row >= end; row--) {
        const word oldest = back[row - end][state >> 2 & 31];
        if (writes && lane == 0) code[row] = (byte)(state & 3);
        state = (state >> 2) + 64 * (int)(oldest >> 2 * (4 * (state >> 7) + (state & 3)) & 3);
    }
    if (writes && lane == 0 && end == 0)
        for (int k = 0; k < EARLIER5; k++) code[-1 - k] = (byte)(state >> 2 * k & 3);
    return state;
}

#define GIVEN \
    float *target, const float *original, const float *feedback, const float *table, const float *scale, \
        const float *weight, byte *codes, float *errors, int *state, int columns, int rows, int column, int first
#define GROUP {target, original, feedback, table, scale, weight, codes, errors, state, columns, rows, column, first}

/* Choose the state of a column wherever two segments meet. */
extern "C" __global__ void __launch_bounds__(THREADS) meet(GIVEN) {
    __shared__ Back back[WARPS][MARGIN];
    __shared__ Costs costs[WARPS][2];
    const Group group = GROUP;
    const int warp = threadIdx.x / 32, segment = blockIdx.x * WARPS + warp + 1, end = group.start(segment);
    if (end >= rows) return;
    const int from = end < MARGIN ? 0 : end - MARGIN, to = min(end + MARGIN, rows);
    const int found = run(group, from, end, to, -1, -1, false, back[warp], costs[warp]);
    if (threadIdx.x % 32 == 0) state[segment] = found;
}

/* Choose the codes of a column. The errors of the column before it are written, so column number `columns` ends a group. */
extern "C" __global__ void __launch_bounds__(THREADS) search(GIVEN) {
    __shared__ Back back[SEARCHED][SEGMENT];
    __shared__ Costs costs[SEARCHED][2];
    const Group group = GROUP;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, segment = blockIdx.x * SEARCHED + warp;
    const int start = group.start(segment), stop = min(group.start(segment + 1), rows);
    if (start >= rows) return;
    if (column == columns) {
        for (int row = start + lane; row < stop; row += 32) errors[(size_t)(column - 1) * rows + row] = group.last_error(row);
        return;
    }
    const int from = start ? __ldg(state + segment) : -1, to = stop < rows ? __ldg(state + segment + 1) : -1;
    run(group, start, start, stop, from, to, true, back[warp], costs[warp]);
}
