/* The rotation of inputs, format/SPEC.md, section 6: random signs, then Hadamard blocks. The operations come in the order of the
 * CPU's kernels and are never contracted, so float32 results have their bits. */
__device__ __forceinline__ float with_sign(float value, int column) {
    unsigned long long z = (unsigned long long)column + 0x9E3779B97F4A7C15ull;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ z >> 27) * 0x94D049BB133111EBull;
    z ^= z >> 31;
    return __uint_as_float(__float_as_uint(value) ^ ((word)(z >> 32) & 0x80000000u));
}

/* Spread places over the banks of shared memory. */
__device__ __forceinline__ int spread(int place) { return place + place / 32; }

/* Do BITS steps of the transform, from the one that combines values `half` apart. */
template <int BITS> __device__ __forceinline__ void butterflies(float *values, int length, int half) {
    for (int i = threadIdx.x; i < length >> BITS; i += THREADS) {
        const int base = (i / half * half << BITS) + i % half;
        float v[1 << BITS];
#pragma unroll
        for (int k = 0; k < 1 << BITS; k++) v[k] = values[spread(base + k * half)];
#pragma unroll
        for (int step = 1; step < 1 << BITS; step *= 2)
#pragma unroll
            for (int k = 0; k < 1 << BITS; k++)
                if (!(k & step)) {
                    const float a = v[k], b = v[k + step];
                    v[k] = a + b;
                    v[k + step] = a - b;
                }
#pragma unroll
        for (int k = 0; k < 1 << BITS; k++) values[spread(base + k * half)] = v[k];
    }
    __syncthreads();
}

/* Do the steps of Hadamard blocks of 1 << bits values, without their scale. */
__device__ __forceinline__ void transform(float *values, int length, int bits) {
    int done = 0;
    for (; done + 4 <= bits; done += 4) butterflies<4>(values, length, 1 << done);
    for (; done < bits; done++) butterflies<1>(values, length, 1 << done);
}

/* Transform each row of x, (gridDim.x, columns), by Hadamard blocks of 1 << bits columns, at most CHUNK. A thread block takes
 * CHUNK columns. Signs come first with `before`, last with `after`. */
extern "C" __global__ void __launch_bounds__(THREADS)
    rotate(const void *x, int x_type, void *out, int out_type, int columns, int bits, float scale, int before, int after) {
    __shared__ float values[CHUNK + CHUNK / 32];
    const int start = blockIdx.y * CHUNK, length = min(CHUNK, columns - start);
    const size_t row = (size_t)blockIdx.x * columns;
    for (int i = threadIdx.x; i < length; i += THREADS) {
        const float value = read_number(x, x_type, row + start + i);
        values[spread(i)] = before ? with_sign(value, start + i) : value;
    }
    __syncthreads();
    transform(values, length, bits);
    for (int i = threadIdx.x; i < length; i += THREADS) {
        const float value = values[spread(i)] * scale;
        write_number(out, out_type, row + start + i, after ? with_sign(value, start + i) : value);
    }
}

/* Do one step of larger Hadamard blocks in place: combine values `half` apart, in each row of x, (gridDim.x, columns). */
extern "C" __global__ void __launch_bounds__(THREADS)
    butterfly(float *x, int columns, int half, float scale, int after) {
    float *row = x + (size_t)blockIdx.x * columns;
    for (int i = blockIdx.y * THREADS + threadIdx.x; i < columns / 2; i += gridDim.y * THREADS) {
        const int low = i / half * half * 2 + i % half, high = low + half;
        const float a = row[low], b = row[high], sum = (a + b) * scale, difference = (a - b) * scale;
        row[low] = after ? with_sign(sum, low) : sum;
        row[high] = after ? with_sign(difference, high) : difference;
    }
}
