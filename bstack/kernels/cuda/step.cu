/* What a step computes between the products: norms, rotary positions, attention, activations. Numbers are float32.
 *
 * A step reads one token of each of some texts. A text is a row of a table in device memory: the position of the token, and the
 * address of a list with the addresses of its pages. A page holds keys and values of PAGE tokens in half precision, for each of
 * both, each layer and each head: keys as (width, PAGE), values as (PAGE, width).
 */
constexpr int PAGE = 64, SPLITS = 16, WIDEST = 512; /* tokens of a page, parts of a text, values of a head */
constexpr float LARGEST = 65504.0f;

struct Caches {
    int layer, layers, heads, width;

    __device__ __forceinline__ size_t place(int kind, int head) const {
        return (((size_t)kind * layers + layer) * heads + head) * PAGE * width;
    }
};

__device__ __forceinline__ word16 *page_of(const long long *texts, int text, int number) {
    const long long *pages = (const long long *)(size_t)__ldg(texts + 2 * text + 1);
    return (word16 *)(size_t)__ldg(pages + number);
}

/* Sum a value of each thread over the block; all threads get the result. */
__device__ __forceinline__ float sum_of_block(float value, float *shared) {
    for (int step = 16; step; step /= 2) value += __shfl_xor_sync(~0u, value, step);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
    __syncthreads();
    value = 0.0f;
    for (int warp = 0; warp < WARPS; warp++) value += shared[warp];
    __syncthreads();
    return value;
}

__device__ __forceinline__ float largest_of_block(float value, float *shared) {
    for (int step = 16; step; step /= 2) value = fmaxf(value, __shfl_xor_sync(~0u, value, step));
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
    __syncthreads();
    for (int warp = 0; warp < WARPS; warp++) value = fmaxf(value, shared[warp]);
    __syncthreads();
    return value;
}

/* Write value(column) of a row, and rotated as the kernel `rotate` does it, where Hadamard blocks are at most CHUNK columns. */
template <typename Value>
__device__ __forceinline__ void write_row(const Value &value, float *plain, float *rotated, int columns, int bits,
                                          float *values) {
    const int start = blockIdx.y * CHUNK, length = min(CHUNK, columns - start);
    const size_t row = (size_t)blockIdx.x * columns + start;
    for (int i = threadIdx.x; i < length; i += THREADS) {
        const float found = value(start + i);
        plain[row + i] = found;
        values[spread(i)] = with_sign(found, start + i);
    }
    if (!rotated) return;
    __syncthreads();
    transform(values, length, bits);
    const float scale = rsqrtf((float)(1 << bits));
    for (int i = threadIdx.x; i < length; i += THREADS) rotated[row + i] = values[spread(i)] * scale;
}

struct RowShared {
    float values[CHUNK + CHUNK / 32], sums[WARPS];
};

/* Add a layer's result to the hidden state, after its own norm where it has one, and normalise the sum for what follows. */
extern "C" __global__ void __launch_bounds__(THREADS)
    prepare(const float *x, const float *added, const float *added_norm, const float *norm, float *sum, float *plain,
            float *rotated, int columns, int bits, float epsilon) {
    __shared__ RowShared shared;
    const size_t row = (size_t)blockIdx.x * columns;
    const int start = blockIdx.y * CHUNK, stop = min(start + CHUNK, columns);
    float added_scale = 1.0f, scale = 1.0f;
    if (added_norm) {
        float squares = 0.0f;
        for (int i = threadIdx.x; i < columns; i += THREADS) squares += __ldg(added + row + i) * __ldg(added + row + i);
        added_scale = 1.0f / sqrtf(sum_of_block(squares, shared.sums) / (float)columns + epsilon);
    }
    const auto whole = [&](int i) {
        const float value = __ldg(x + row + i);
        if (!added) return value;
        return value + (added_norm ? __ldg(added + row + i) * added_scale * __ldg(added_norm + i) : __ldg(added + row + i));
    };
    if (norm) {
        float squares = 0.0f;
        for (int i = threadIdx.x; i < columns; i += THREADS) squares += whole(i) * whole(i);
        scale = 1.0f / sqrtf(sum_of_block(squares, shared.sums) / (float)columns + epsilon);
    }
    if (sum)
        for (int i = start + threadIdx.x; i < stop; i += THREADS) sum[row + i] = whole(i);
    write_row([&](int i) { return norm ? whole(i) * scale * __ldg(norm + i) : whole(i); }, plain, rotated, columns, bits,
              shared.values);
}

/* Normalise and turn the queries and keys of a token, and put its keys and values into the caches. blockIdx.x is a head of
 * queries, then of keys, then of values; blockIdx.y is the text. */
extern "C" __global__ void __launch_bounds__(THREADS)
    heads(const float *given, const float *query_norm, const float *key_norm, const long long *texts, const float *cosine,
          const float *sine, float *query, int queries, int keys, int width, int layer, int layers, int rotary, int ropes, int rope,
          float epsilon) {
    __shared__ float values[WIDEST], sums[WARPS];
    const int head = blockIdx.x, text = blockIdx.y, kind = head < queries ? 0 : head < queries + keys ? 1 : 2;
    const float *norm = kind == 0 ? query_norm : kind == 1 ? key_norm : 0;
    given += ((size_t)text * gridDim.x + head) * width;
    float squares = 0.0f;
    for (int i = threadIdx.x; i < width; i += THREADS) {
        values[i] = __ldg(given + i);
        squares += values[i] * values[i];
    }
    squares = sum_of_block(squares, sums);
    if (norm) {
        const float scale = 1.0f / sqrtf(squares / (float)width + epsilon);
        for (int i = threadIdx.x; i < width; i += THREADS) values[i] *= scale * __ldg(norm + i);
    }
    __syncthreads();
    const int position = (int)__ldg(texts + 2 * text), at = position % PAGE;
    const size_t angle = ((size_t)text * ropes + rope) * rotary;
    const Caches caches = {layer, layers, keys, width};
    word16 *page = kind ? page_of(texts, text, position / PAGE) + caches.place(kind - 1, head - queries - (kind - 1) * keys) : 0;
    for (int i = threadIdx.x; i < width; i += THREADS) {
        float value = values[i];
        if (kind < 2 && rope >= 0 && i < rotary) {
            const float other = i < rotary / 2 ? -values[i + rotary / 2] : values[i - rotary / 2];
            value = value * __ldg(cosine + angle + i) + other * __ldg(sine + angle + i);
        }
        if (kind == 0)
            query[((size_t)text * queries + head) * width + i] = value;
        else /* NaN stays what it is. */
            page[kind == 1 ? i * PAGE + at : at * width + i] =
                float_to_half(fabsf(value) > LARGEST ? copysignf(LARGEST, value) : value);
    }
}

/* Attention of GROUP heads of queries to one head of keys, over one of the SPLITS parts of a text. Softmax goes on from THREADS
 * tokens to the next. blockIdx.x is head of keys, queries of it by GROUP, part; blockIdx.y is the text. A part leaves, for each
 * head of queries, its largest score, the sum of weights, and the values added up: (text, head, part, 2 + width). */
template <int GROUP> struct AttendShared {
    float query[GROUP][WIDEST], weight[GROUP][THREADS], value[GROUP][WIDEST], sums[WARPS];
};

template <int GROUP>
__device__ __forceinline__ void attend(const float *query, const long long *texts, float *parts, const Caches &caches,
                                       int group, int window, float scale, float cap, AttendShared<GROUP> *shared) {
    const int width = caches.width, text = blockIdx.y, split = blockIdx.x % SPLITS, together = (group + GROUP - 1) / GROUP;
    const int head = blockIdx.x / SPLITS / together, first_query = blockIdx.x / SPLITS % together * GROUP;
    const int position = (int)__ldg(texts + 2 * text), begin = window ? max(0, position - window + 1) : 0;
    const int units = position / THREADS + 1 - begin / THREADS, each = (units + SPLITS - 1) / SPLITS;
    const int unit = begin / THREADS + split * each, stop = min(unit + each, position / THREADS + 1);
    float most[GROUP], total[GROUP];
#pragma unroll
    for (int g = 0; g < GROUP; g++) most[g] = -3e38f, total[g] = 0.0f;
    for (int i = threadIdx.x; i < GROUP * width; i += THREADS) {
        const int g = i / width, own = head * group + first_query + g;
        const bool there = first_query + g < group;
        shared->query[g][i % width] =
            there ? scale * __ldg(query + ((size_t)text * caches.heads * group + own) * width + i % width) : 0.0f;
        shared->value[g][i % width] = 0.0f;
    }
    __syncthreads();
    /* Values of narrow heads are added up by several threads each. */
    const int rows = max(1, THREADS / width), row = threadIdx.x / min(width, THREADS);
    for (int now = unit; now < stop; now++) {
        const int token = now * THREADS + threadIdx.x;
        const bool seen = token >= begin && token <= position;
        float score[GROUP];
#pragma unroll
        for (int g = 0; g < GROUP; g++) score[g] = 0.0f;
        if (seen) {
            const word16 *keys = page_of(texts, text, token / PAGE) + caches.place(0, head) + token % PAGE;
#pragma unroll 16
            for (int i = 0; i < width; i++) {
                const float key = half_to_float(__ldg(keys + (size_t)i * PAGE));
#pragma unroll
                for (int g = 0; g < GROUP; g++) score[g] += shared->query[g][i] * key;
            }
        }
#pragma unroll
        for (int g = 0; g < GROUP; g++) {
            if (cap > 0.0f) score[g] = cap * tanhf(score[g] / cap);
            const float before = most[g];
            most[g] = fmaxf(before, largest_of_block(seen ? score[g] : -3e38f, shared->sums));
            const float kept = expf(before - most[g]), weight = seen ? expf(score[g] - most[g]) : 0.0f;
            total[g] = total[g] * kept + sum_of_block(weight, shared->sums);
            shared->weight[g][threadIdx.x] = weight;
            for (int i = threadIdx.x; i < width; i += THREADS) shared->value[g][i] *= kept;
        }
        __syncthreads();
        const int inside = min(THREADS, position + 1 - now * THREADS), page = now * (THREADS / PAGE);
        const word16 *first = page_of(texts, text, page) + caches.place(1, head);
        const word16 *second = page_of(texts, text, min(page + 1, position / PAGE)) + caches.place(1, head);
        for (int i = threadIdx.x - row * min(width, THREADS); i < width && row < rows; i += THREADS) {
            float sum[GROUP];
#pragma unroll
            for (int g = 0; g < GROUP; g++) sum[g] = 0.0f;
#pragma unroll 16
            for (int t = max(0, begin - now * THREADS) + row; t < inside; t += rows) {
                const float value = half_to_float(__ldg((t < PAGE ? first : second) + (size_t)(t % PAGE) * width + i));
#pragma unroll
                for (int g = 0; g < GROUP; g++) sum[g] += shared->weight[g][t] * value;
            }
#pragma unroll
            for (int g = 0; g < GROUP; g++) {
                if (rows == 1)
                    shared->value[g][i] += sum[g];
                else
                    shared->query[g][WIDEST - THREADS + threadIdx.x] = sum[g]; /* behind a narrow head's queries */
            }
        }
        __syncthreads();
        if (rows > 1 && row == 0)
            for (int g = 0; g < GROUP; g++)
                for (int other = 0; other < rows; other++)
                    shared->value[g][threadIdx.x] += shared->query[g][WIDEST - THREADS + other * width + threadIdx.x];
    }
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
        if (first_query + g >= group) continue;
        const size_t own = ((size_t)text * caches.heads + head) * group + first_query + g;
        float *to = parts + (own * SPLITS + split) * (2 + width);
        if (threadIdx.x == 0) to[0] = most[g], to[1] = total[g];
        for (int i = threadIdx.x; i < width; i += THREADS) to[2 + i] = shared->value[g][i];
    }
}

#define ATTEND(GROUP)                                                                                                      \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                                  \
        attend_##GROUP(const float *query, const long long *texts, float *parts, int layer, int layers, int heads,         \
                       int width, int group, int window, float scale, float cap) {                                         \
        __shared__ AttendShared<GROUP> shared;                                                                             \
        const Caches caches = {layer, layers, heads, width};                                                               \
        attend<GROUP>(query, texts, parts, caches, group, window, scale, cap, &shared);                                    \
    }
ATTEND(1)
ATTEND(4)

/* Join the parts of `attend` to what the heads read, (texts, heads x width). */
extern "C" __global__ void __launch_bounds__(THREADS)
    attended(const float *parts, float *plain, float *rotated, int columns, int bits, int width) {
    __shared__ RowShared shared;
    const auto joined = [&](int i) {
        const float *own = parts + ((size_t)blockIdx.x * columns + i) / width * SPLITS * (2 + width);
        float most = -3e38f, total = 0.0f, sum = 0.0f;
        for (int split = 0; split < SPLITS; split++) most = fmaxf(most, __ldg(own + split * (2 + width)));
        for (int split = 0; split < SPLITS; split++) {
            const float *part = own + split * (2 + width);
            const float weight = __ldg(part + 1) > 0.0f ? expf(__ldg(part) - most) : 0.0f;
            total += weight * __ldg(part + 1);
            sum += weight * __ldg(part + 2 + i % width);
        }
        return sum / total;
    };
    write_row(joined, plain, rotated, columns, bits, shared.values);
}

/* Apply the activation, 0 for SiLU and 1 for the tanh form of GELU, to the first half of each row and multiply by the second. */
extern "C" __global__ void __launch_bounds__(THREADS)
    activated(const float *given, float *plain, float *rotated, int columns, int bits, int activation) {
    __shared__ RowShared shared;
    const float *row = given + (size_t)blockIdx.x * 2 * columns;
    const auto value = [&](int i) {
        const float gate = __ldg(row + i), up = __ldg(row + columns + i);
        if (activation == 0) return gate / (1.0f + expf(-gate)) * up;
        return 0.5f * gate * (1.0f + tanhf(0.7978845608f * (gate + 0.044715f * gate * gate * gate))) * up;
    };
    write_row(value, plain, rotated, columns, bits, shared.values);
}
