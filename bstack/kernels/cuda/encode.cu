/* The search of the encoder for trellis5 blocks: csrc/encode.c on a GPU, with its operations in its order and never contracted.
 *
 * A column's rows are cut into segments, and a warp searches each, so codes of two paths meet where segments do. Therefore a search
 * starts MARGIN rows early and looks MARGIN rows ahead; what it finds there is dropped. With one segment the codes are those of the
 * CPU, bit for bit. Columns follow one another, a launch for each, because a search reads errors of its neighbours' rows.
 *
 * Of the 256 states a lane has those whose low five bits are its number. They lead to the eight states 4 q + c, q = lane and
 * lane + 32, whose costs go to their lanes through shared memory.
 */
constexpr int STATES = 256, EARLIER5 = 4, SEGMENT = 128, MARGIN = 32;

/* What is given for a group of columns, as bstack_trellis_encode takes it: contiguous columns, all of `rows` rows. */
struct Group {
    const float *target, *original, *feedback, *table, *scale, *weight;
    byte *codes;
    float *errors;
    int columns, rows;

    /* Compute the error of a row in a column whose codes are chosen. */
    __device__ __forceinline__ float error(int column, int row) const {
        const byte *code = codes + (size_t)column * (EARLIER5 + rows) + row;
        const int own = __ldg(code + 4) ^ __ldg(code + 2) ^ __ldg(code);
        const float value = __ldg(table + (__ldg(code + 3) + 4 * own + 16 * __ldg(code + 1)));
        return __fsub_rn(__ldg(original + (size_t)column * rows + row), __fmul_rn(__ldg(scale + row), value));
    }

    /* Compute what a row of a column should become, in units of the scale; keep the error before it if it is this warp's to keep. */
    __device__ __forceinline__ float wanted(int column, int row, bool keeps) const {
        float x = column < columns ? __ldg(target + (size_t)column * rows + row) : 0.0f;
        for (int k = 0; k < column; k++) {
            float *kept = errors + (size_t)k * rows + row;
            const bool last = k == column - 1;
            if (column == columns && !last) continue;
            const float e = last ? error(k, row) : __ldg(kept);
            if (last && keeps) *kept = e;
            if (column < columns) x = __fadd_rn(x, __fmul_rn(__ldg(feedback + (size_t)k * columns + column), e));
        }
        return __fmul_rn(x, __frcp_rn(__ldg(scale + row)));
    }
};

/* Choose the codes of a column of a group. The errors of the column before it are written, so column number `columns` ends a group. */
extern "C" __global__ void __launch_bounds__(THREADS)
    search(const float *target, const float *original, const float *feedback, const float *table, const float *scale,
           const float *weight, byte *codes, float *errors, int columns, int rows, int column) {
    __shared__ word16 back[WARPS][SEGMENT + MARGIN][32]; /* the oldest code on the way to each of a lane's states, by row */
    __shared__ float4 costs[WARPS][2][STATES / 4];
    const Group group = {target, original, feedback, table, scale, weight, codes, errors, columns, rows};
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int start = (blockIdx.x * WARPS + warp) * SEGMENT, stop = min(start + SEGMENT, rows);
    if (start >= rows) return;
    if (column == columns) {
        for (int row = start + lane; row < stop; row += 32) group.wanted(column, row, true);
        return;
    }
    const int first = start ? start - MARGIN : 0, last = min(stop + MARGIN, rows);

    float value[2][4], before[8]; /* by half of the states and newest code ^ oldest code; by state / 32 */
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const int q = lane + 32 * h;
            value[h][k] = __ldg(table + ((q & 3) + 4 * (k ^ (q >> 2 & 3)) + 16 * (q >> 4)));
        }
#pragma unroll
    for (int k = 0; k < 8; k++) before[k] = 0.0f;

    for (int chunk = first; chunk < last; chunk += 32) {
        const int mine = chunk + lane;
        const float own_x = mine < last ? group.wanted(column, mine, start <= mine && mine < stop) : 0.0f;
        const float own_weight = mine < last ? __ldg(weight + mine) : 0.0f;
        for (int row = chunk; row < min(chunk + 32, last); row++) {
            const float x = __shfl_sync(~0u, own_x, row - chunk), w = __shfl_sync(~0u, own_weight, row - chunk);
            float4 *to = costs[warp][row & 1];
            word oldest = 0;
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float cost[4], after[4];
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    const float d = __fsub_rn(x, value[h][k]);
                    cost[k] = __fmul_rn(w, __fmul_rn(d, d));
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
                to[lane + 32 * h] = four;
            }
            if (row >= start) back[warp][row - start][lane] = (word16)oldest;
            __syncwarp();
#pragma unroll
            for (int k = 0; k < 8; k++) before[k] = ((const float *)to)[32 * k + lane];
            if (((row - first) & 15) == 15) { /* keep the sums small, so that single precision is fine enough */
                const float zero = ((const float *)to)[0];
#pragma unroll
                for (int k = 0; k < 8; k++) before[k] = __fsub_rn(before[k], zero);
            }
        }
    }

    float least = before[0];
    int state = lane;
#pragma unroll
    for (int k = 1; k < 8; k++)
        if (before[k] < least) least = before[k], state = 32 * k + lane;
    for (int step = 16; step; step /= 2) {
        const float other = __shfl_xor_sync(~0u, least, step);
        const int its = (int)__shfl_xor_sync(~0u, (float)state, step);
        if (other < least || (other == least && its < state)) least = other, state = its;
    }
    byte *code = codes + (size_t)column * (EARLIER5 + rows) + EARLIER5;
    for (int row = last - 1; row >= start; row--) {
        const word oldest = back[warp][row - start][state >> 2 & 31];
        if (row < stop && lane == 0) code[row] = (byte)(state & 3);
        state = (state >> 2) + 64 * (int)(oldest >> 2 * (4 * (state >> 7) + (state & 3)) & 3);
    }
    if (start == 0 && lane == 0)
        for (int row = -1; row >= -EARLIER5; row--, state >>= 2) code[row] = (byte)(state & 3);
}
