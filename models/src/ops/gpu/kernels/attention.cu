// Attention over pixels on tensor cores, forward and backward: FlashAttention-2 (Dao 2023, arXiv:2307.08691), whose
// scores never leave the registers.
//
// q, k, v, o and their gradients are (B, T, C) bf16, or f32 which is multiplied in TF32, T pixels, C = heads·d, d a
// multiple of 8; lse and delta are (B, heads, T) f32. The biases (C) f32 of q, k and v, each of which may be null, are
// added on the way in, and the sum is rounded to bf16 or TF32. The kernels named _D and _f32_D are for d ≤ D and fill up
// with zeros. All have a grid of (T / 64 rounded up, B·heads) and 128 threads, and no dynamic shared memory. Nothing is added up by atomics: the same arguments give the
// same bits.
//
// The keys' biases change neither o nor a gradient, as the softmax of a query does not see what its scores have in
// common. Where all three kernels get null for them, dq is the more exact: its error carries them (see the test).
//
// A block owns 64 rows (queries, or in backward_kv keys), a warp 16 of them, and walks along all rows of the other kind
// in tiles of 64. Its own rows wait in registers, as the left-hand fragments of every product.
#include "common.cuh"

#define THREADS 128
#define ROWS 64
#define LOG2E 1.44269504088896341f
// Tiles have rows of D values and 16 bytes: eight rows then start in different banks, and are read at once.
template <typename T, int D> constexpr int STRIDE = D + 16 / (int)sizeof(T);
// Columns of a left-hand fragment.
template <typename T> constexpr int DEPTH = 32 / (int)sizeof(T);
// The columns of scores that backward has in registers at a time.
template <typename T, int D> constexpr int CHUNK = D * (int)sizeof(T) == 256 ? 16 : 32;
template <typename T, int D> using Fragments = uint32_t[D / DEPTH<T>][4];

// One head of one picture.
struct Head {
    int T, C, d, channel;
    size_t start, row;
    __device__ Head(int heads, int T, int d)
        : T(T), C(heads * d), d(d), channel(blockIdx.y % heads * d),
          start((size_t)(blockIdx.y / heads) * T * C + channel), row((size_t)blockIdx.y * T) {}
};

// What the multiplier sees of 16 bytes.
__device__ __forceinline__ uint4 rounded(const float (&v)[8], bf16) {
    return make_uint4(bf16_pair(v[0], v[1]), bf16_pair(v[2], v[3]), bf16_pair(v[4], v[5]), bf16_pair(v[6], v[7]));
}
__device__ __forceinline__ uint4 rounded(const float (&v)[4], float) {
    return make_uint4(tf32(v[0]), tf32(v[1]), tf32(v[2]), tf32(v[3]));
}

// Copies rows of a head into a tile, zeros where there are none. A thread always copies the same channels, so it keeps
// their biases in registers.
template <typename T, int D, bool BIASED> struct Reader {
    static constexpr int W = Vec<T>::N, V = D / W, N = ROWS * V / THREADS;
    const T* from;
    int C, rows;
    float bias[W];
    __device__ Reader(const T* x, const float* b, const Head& at)
        : from(x + at.start + threadIdx.x % V * W), C(at.C), rows((int)threadIdx.x % V * W < at.d ? at.T : 0), bias{} {
        if (BIASED && rows > 0) add_row<W>(b == nullptr ? b : b + at.channel + threadIdx.x % V * W, bias);
    }
    __device__ __forceinline__ void read(T* tile, int first) const {
        // Four loads are on their way at a time; more would not leave the accumulators enough registers.
        constexpr int BATCH = N < 4 ? N : 4;
#pragma unroll
        for (int start = 0; start < N; start += BATCH) {
            uint4 raw[BATCH];
#pragma unroll
            for (int i = 0; i < BATCH; i++) {
                const int r = first + row(start + i);
                raw[i] = make_uint4(0, 0, 0, 0);
                if (r < rows) raw[i] = *reinterpret_cast<const uint4*>(from + (size_t)r * C);
            }
#pragma unroll
            for (int i = 0; i < BATCH; i++) {
                const int r = row(start + i);
                // bf16 without a bias is as it should be.
                if ((BIASED || sizeof(T) == 4) && first + r < rows) {
                    float v[W];
                    Vec<T>::load(reinterpret_cast<const T*>(&raw[i]), v);
#pragma unroll
                    for (int c = 0; c < W; c++) v[c] += bias[c];
                    raw[i] = rounded(v, T());
                }
                *reinterpret_cast<uint4*>(tile + r * STRIDE<T, D> + threadIdx.x % V * W) = raw[i];
            }
        }
    }
    static __device__ __forceinline__ int row(int i) { return threadIdx.x / V + i * (THREADS / V); }
};

// A warp's 16 rows as left-hand fragments.
template <int D> __device__ __forceinline__ void fragments(Fragments<bf16, D>& a, const bf16* tile) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < D / 16; k++) ldmatrix_x4(a[k], tile + lane % 16 * STRIDE<bf16, D> + 16 * k + lane / 16 * 8);
}

// sums (16×N) += a (16×D)·tileᵀ, N rows of the tile.
template <int D, int N>
__device__ __forceinline__ void times_rows(float (&sums)[N / 8][4], const Fragments<bf16, D>& a, const bf16* tile) {
    const int lane = threadIdx.x % 32;
    tile += (lane / 16 * 8 + lane % 8) * STRIDE<bf16, D> + lane / 8 % 2 * 8;
#pragma unroll
    for (int k = 0; k < D / 16; k++)
#pragma unroll
        for (int n = 0; n < N / 16; n++) {
            uint32_t b[4];
            ldmatrix_x4(b, tile + 16 * n * STRIDE<bf16, D> + 16 * k);
            mma_bf16(sums[2 * n], a[k], b[0], b[1]);
            mma_bf16(sums[2 * n + 1], a[k], b[2], b[3]);
        }
}

// sums (16×D) += p (16×N)·tile (N×D). As results of products lie in the registers, two neighbouring tiles of p make a
// left-hand fragment.
template <int D, int N>
__device__ __forceinline__ void times_tile(float (&sums)[D / 8][4], const float (&p)[N / 8][4], const bf16* tile) {
    const int lane = threadIdx.x % 32;
    tile += lane % 16 * STRIDE<bf16, D> + lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < N / 16; k++) {
        const float(&left)[4] = p[2 * k], (&right)[4] = p[2 * k + 1];
        const uint32_t a[4] = {bf16_pair(left[0], left[1]), bf16_pair(left[2], left[3]), bf16_pair(right[0], right[1]),
                               bf16_pair(right[2], right[3])};
#pragma unroll
        for (int n = 0; n < D / 16; n++) {
            uint32_t b[4];
            ldmatrix_x4_trans(b, tile + 16 * k * STRIDE<bf16, D> + 16 * n);
            mma_bf16(sums[2 * n], a, b[0], b[1]);
            mma_bf16(sums[2 * n + 1], a, b[2], b[3]);
        }
    }
}

// Writes a warp's 16 rows, from `first` on, times a factor each for the upper and the lower eight. They go through 16
// rows of a tile that nobody else uses any more, so that memory gets 16 bytes at a time.
template <int D>
__device__ __forceinline__ void write(const float (&sums)[D / 8][4], float upper, float lower, bf16* tile, bf16* to,
                                      int first, const Head& at) {
    const int lane = threadIdx.x % 32;
    bf16* corner = tile + lane / 4 * STRIDE<bf16, D> + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < D / 8; n++) {
        bf16 *above = corner + 8 * n, *below = above + 8 * STRIDE<bf16, D>;
        *reinterpret_cast<uint32_t*>(above) = bf16_pair(sums[n][0] * upper, sums[n][1] * upper);
        *reinterpret_cast<uint32_t*>(below) = bf16_pair(sums[n][2] * lower, sums[n][3] * lower);
    }
    __syncwarp();
#pragma unroll
    for (int i = lane; i < 16 * (D / 8); i += 32) {
        const int row = i / (D / 8), c = i % (D / 8) * 8;
        if (first + row < at.T && c < at.d)
            *reinterpret_cast<uint4*>(to + at.start + (size_t)(first + row) * at.C + c) =
                *reinterpret_cast<const uint4*>(tile + row * STRIDE<bf16, D> + c);
    }
}

// The same in TF32, whose fragments are eight columns deep and need no ldmatrix.
template <int D> __device__ __forceinline__ void fragments(Fragments<float, D>& a, const float* tile) {
    const int lane = threadIdx.x % 32;
    tile += lane / 4 * STRIDE<float, D> + lane % 4;
#pragma unroll
    for (int k = 0; k < D / 8; k++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            a[k][i] = __float_as_uint(tile[i % 2 * 8 * STRIDE<float, D> + 8 * k + i / 2 * 4]);
}

template <int D, int N>
__device__ __forceinline__ void times_rows(float (&sums)[N / 8][4], const Fragments<float, D>& a, const float* tile) {
    const int lane = threadIdx.x % 32;
    tile += lane / 4 * STRIDE<float, D> + lane % 4;
#pragma unroll
    for (int k = 0; k < D / 8; k++)
#pragma unroll
        for (int n = 0; n < N / 8; n++) {
            const float* b = tile + 8 * n * STRIDE<float, D> + 8 * k;
            mma_tf32(sums[n], a[k], __float_as_uint(b[0]), __float_as_uint(b[4]));
        }
}

// A result holds columns 2t and 2t + 1 where a left-hand fragment wants t and t + 4: it is taken as it lies, and the
// rows of the tile in the same order.
template <int D, int N>
__device__ __forceinline__ void times_tile(float (&sums)[D / 8][4], const float (&p)[N / 8][4], const float* tile) {
    const int lane = threadIdx.x % 32;
    tile += lane % 4 * 2 * STRIDE<float, D> + lane / 4;
#pragma unroll
    for (int k = 0; k < N / 8; k++) {
        const uint32_t a[4] = {tf32(p[k][0]), tf32(p[k][2]), tf32(p[k][1]), tf32(p[k][3])};
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            const float* b = tile + 8 * k * STRIDE<float, D> + 8 * n;
            mma_tf32(sums[n], a, __float_as_uint(b[0]), __float_as_uint(b[STRIDE<float, D>]));
        }
    }
}

template <int D>
__device__ __forceinline__ void write(const float (&sums)[D / 8][4], float upper, float lower, float*, float* to,
                                      int first, const Head& at) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < D / 8; n++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = first + lane / 4 + 8 * half, c = 8 * n + lane % 4 * 2;
            const float factor = half == 0 ? upper : lower;
            if (row < at.T && c < at.d)
                *reinterpret_cast<float2*>(to + at.start + (size_t)row * at.C + c) =
                    make_float2(sums[n][2 * half] * factor, sums[n][2 * half + 1] * factor);
        }
}

// o, and the logarithms of the sums of exp(scores) that backward needs.
template <typename T, int D>
__device__ __forceinline__ void attention_forward(const T* q, const T* k, const T* v, const float* qb,
                                                  const float* kb, const float* vb, T* o, float* lse, int heads,
                                                  int pixels, int d, float scale) {
    __shared__ __align__(16) T keys[ROWS * STRIDE<T, D>];
    __shared__ __align__(16) T values[ROWS * STRIDE<T, D>];
    const Head at(heads, pixels, d);
    const int lane = threadIdx.x % 32, own = threadIdx.x / 32 * 16, first = blockIdx.x * ROWS + own;
    Fragments<T, D> queries;
    Reader<T, D, true>(q, qb, at).read(keys, blockIdx.x * ROWS);
    __syncthreads();
    fragments<D>(queries, keys + own * STRIDE<T, D>);

    const Reader<T, D, true> of_keys(k, kb, at), of_values(v, vb, at);
    const float to_log2 = scale * LOG2E;
    // A lane sees two rows, lane / 4 and 8 further down; the four lanes of a quad share them.
    float sums[D / 8][4] = {}, most[2] = {-INFINITY, -INFINITY}, total[2] = {};
    for (int start = 0; start < pixels; start += ROWS) {
        __syncthreads();
        of_keys.read(keys, start);
        of_values.read(values, start);
        __syncthreads();
        if (first >= pixels) continue;
        float s[ROWS / 8][4] = {};
        times_rows<D, ROWS>(s, queries, keys);
        if (start + ROWS > pixels)
#pragma unroll
            for (int i = 0; i < ROWS / 2; i++)
                if (start + i / 4 * 8 + lane % 4 * 2 + i % 2 >= pixels) s[i / 4][i % 4] = -INFINITY;
#pragma unroll
        for (int row = 0; row < 2; row++) {
            float now = most[row];
#pragma unroll
            for (int j = 0; j < ROWS / 8; j++) now = fmaxf(now, fmaxf(s[j][2 * row], s[j][2 * row + 1]));
            now = fmaxf(now, __shfl_xor_sync(0xffffffffu, now, 1));
            now = fmaxf(now, __shfl_xor_sync(0xffffffffu, now, 2));
            const float shrink = exp2_fast((most[row] - now) * to_log2), shift = now * to_log2;
            most[row] = now;
            total[row] *= shrink;
#pragma unroll
            for (int n = 0; n < D / 8; n++) sums[n][2 * row] *= shrink, sums[n][2 * row + 1] *= shrink;
#pragma unroll
            for (int i = 0; i < ROWS / 4; i++) {
                float& p = s[i / 2][2 * row + i % 2];
                p = exp2_fast(p * to_log2 - shift);
                total[row] += p;
            }
        }
        times_tile<D, ROWS>(sums, s, values);
    }
    __syncthreads();
    if (first >= pixels) return;
#pragma unroll
    for (int row = 0; row < 2; row++) {
        total[row] += __shfl_xor_sync(0xffffffffu, total[row], 1);
        total[row] += __shfl_xor_sync(0xffffffffu, total[row], 2);
        const int query = first + lane / 4 + 8 * row;
        if (lane % 4 == 0 && query < pixels) lse[at.row + query] = most[row] * scale + logf(total[row]);
    }
    write<D>(sums, 1.0f / total[0], 1.0f / total[1], keys + own * STRIDE<T, D>, o, first, at);
}

// Σ o·dy over a head's channels, of every pixel: what the softmax's gradient subtracts.
template <typename T>
__device__ __forceinline__ void delta(const T* o, const T* dy, float* to, int heads, int pixels, int d) {
    constexpr int W = Vec<T>::N;
    const Head at(heads, pixels, d);
    // The lanes of a pixel, a power of two.
    int lanes = 1;
    while (lanes * W < d) lanes *= 2;
    const int c = threadIdx.x % lanes * W;
    for (int i = threadIdx.x / lanes; i < ROWS; i += THREADS / lanes) {
        const int pixel = blockIdx.x * ROWS + i;
        float sum = 0;
        if (pixel < pixels && c < d) {
            float a[W], b[W];
            Vec<T>::load(o + at.start + (size_t)pixel * at.C + c, a);
            Vec<T>::load(dy + at.start + (size_t)pixel * at.C + c, b);
#pragma unroll
            for (int j = 0; j < W; j++) sum += a[j] * b[j];
        }
        for (int offset = lanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
        if (pixel < pixels && c == 0) to[at.row + pixel] = sum;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    attention_delta(const bf16* o, const bf16* dy, float* to, int heads, int T, int d) {
    delta(o, dy, to, heads, T, d);
}
extern "C" __global__ void __launch_bounds__(THREADS)
    attention_delta_f32(const float* o, const float* dy, float* to, int heads, int T, int d) {
    delta(o, dy, to, heads, T, d);
}

// The gradients of keys and values. Here scores stand transposed, a row per key.
template <typename T, int D>
__device__ __forceinline__ void attention_backward_kv(const T* q, const T* k, const T* v, const float* qb,
                                                      const float* kb, const float* vb, const T* dy,
                                                      const float* lse, const float* delta, T* dk, T* dv,
                                                      int heads, int pixels, int d, float scale) {
    __shared__ __align__(16) T queries[ROWS * STRIDE<T, D>];
    __shared__ __align__(16) T grads[ROWS * STRIDE<T, D>];
    __shared__ float2 logs[ROWS]; // of every query, lse in units of log 2, and delta
    const Head at(heads, pixels, d);
    const int lane = threadIdx.x % 32, own = threadIdx.x / 32 * 16, first = blockIdx.x * ROWS + own;
    Fragments<T, D> keys, values;
    Reader<T, D, true>(k, kb, at).read(queries, blockIdx.x * ROWS);
    Reader<T, D, true>(v, vb, at).read(grads, blockIdx.x * ROWS);
    __syncthreads();
    fragments<D>(keys, queries + own * STRIDE<T, D>);
    fragments<D>(values, grads + own * STRIDE<T, D>);

    const Reader<T, D, true> of_queries(q, qb, at);
    const Reader<T, D, false> of_grads(dy, nullptr, at);
    const float to_log2 = scale * LOG2E;
    float to_keys[D / 8][4] = {}, to_values[D / 8][4] = {};
    for (int start = 0; start < pixels; start += ROWS) {
        __syncthreads();
        of_queries.read(queries, start);
        of_grads.read(grads, start);
        if (threadIdx.x < ROWS) {
            const int query = start + threadIdx.x;
            // Where there is no query, exp(−∞) makes its weights 0.
            logs[threadIdx.x] = query < pixels ? make_float2(lse[at.row + query] * LOG2E, delta[at.row + query])
                                          : make_float2(INFINITY, 0.0f);
        }
        __syncthreads();
        if (first >= pixels) continue;
#pragma unroll 1
        for (int chunk = 0; chunk < min(ROWS, pixels - start); chunk += CHUNK<T, D>) {
            const T *some_queries = queries + chunk * STRIDE<T, D>, *some_grads = grads + chunk * STRIDE<T, D>;
            float p[CHUNK<T, D> / 8][4] = {}, ds[CHUNK<T, D> / 8][4] = {};
            times_rows<D, CHUNK<T, D>>(p, keys, some_queries);
            times_rows<D, CHUNK<T, D>>(ds, values, some_grads);
#pragma unroll
            for (int i = 0; i < CHUNK<T, D> / 2; i++) {
                const float2 of = logs[chunk + i / 4 * 8 + lane % 4 * 2 + i % 2];
                float& weight = p[i / 4][i % 4];
                weight = exp2_fast(weight * to_log2 - of.x);
                ds[i / 4][i % 4] = weight * (ds[i / 4][i % 4] - of.y);
            }
            times_tile<D, CHUNK<T, D>>(to_values, p, some_grads);
            times_tile<D, CHUNK<T, D>>(to_keys, ds, some_queries);
        }
    }
    __syncthreads();
    if (first >= pixels) return;
    write<D>(to_keys, scale, scale, queries + own * STRIDE<T, D>, dk, first, at);
    write<D>(to_values, 1.0f, 1.0f, grads + own * STRIDE<T, D>, dv, first, at);
}

// The gradient of the queries.
template <typename T, int D>
__device__ __forceinline__ void attention_backward_q(const T* q, const T* k, const T* v, const float* qb,
                                                     const float* kb, const float* vb, const T* dy, const float* lse,
                                                     const float* delta, T* dq, int heads, int pixels, int d,
                                                     float scale) {
    __shared__ __align__(16) T keys[ROWS * STRIDE<T, D>];
    __shared__ __align__(16) T values[ROWS * STRIDE<T, D>];
    const Head at(heads, pixels, d);
    const int lane = threadIdx.x % 32, own = threadIdx.x / 32 * 16, first = blockIdx.x * ROWS + own;
    Fragments<T, D> queries, grads;
    Reader<T, D, true>(q, qb, at).read(keys, blockIdx.x * ROWS);
    Reader<T, D, false>(dy, nullptr, at).read(values, blockIdx.x * ROWS);
    __syncthreads();
    fragments<D>(queries, keys + own * STRIDE<T, D>);
    fragments<D>(grads, values + own * STRIDE<T, D>);
    float shift[2], subtract[2];
#pragma unroll
    for (int row = 0; row < 2; row++) {
        const int query = first + lane / 4 + 8 * row;
        shift[row] = query < pixels ? lse[at.row + query] * LOG2E : INFINITY;
        subtract[row] = query < pixels ? delta[at.row + query] : 0.0f;
    }

    const Reader<T, D, true> of_keys(k, kb, at), of_values(v, vb, at);
    const float to_log2 = scale * LOG2E;
    float sums[D / 8][4] = {};
    for (int start = 0; start < pixels; start += ROWS) {
        __syncthreads();
        of_keys.read(keys, start);
        of_values.read(values, start);
        __syncthreads();
        if (first >= pixels) continue;
#pragma unroll 1
        for (int chunk = 0; chunk < min(ROWS, pixels - start); chunk += CHUNK<T, D>) {
            const T *some_keys = keys + chunk * STRIDE<T, D>, *some_values = values + chunk * STRIDE<T, D>;
            float p[CHUNK<T, D> / 8][4] = {}, ds[CHUNK<T, D> / 8][4] = {};
            times_rows<D, CHUNK<T, D>>(p, queries, some_keys);
            times_rows<D, CHUNK<T, D>>(ds, grads, some_values);
#pragma unroll
            for (int i = 0; i < CHUNK<T, D> / 2; i++) {
                const int key = start + chunk + i / 4 * 8 + lane % 4 * 2 + i % 2, row = i / 2 % 2;
                // A key that is none would have weight exp(−lse), which can be infinite.
                const float weight = key < pixels ? exp2_fast(p[i / 4][i % 4] * to_log2 - shift[row]) : 0.0f;
                ds[i / 4][i % 4] = weight * (ds[i / 4][i % 4] - subtract[row]);
            }
            times_tile<D, CHUNK<T, D>>(sums, ds, some_keys);
        }
    }
    __syncthreads();
    if (first >= pixels) return;
    write<D>(sums, scale, scale, keys + own * STRIDE<T, D>, dq, first, at);
}

// AT_ONCE: how many blocks of forward should fit on a multiprocessor; the most that the registers allow.
#define KERNELS(T, NAME, D, AT_ONCE)                                                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS, AT_ONCE) attention_forward_##NAME(                         \
        const T* q, const T* k, const T* v, const float* qb, const float* kb, const float* vb, T* o, float* lse,     \
        int heads, int pixels, int d, float scale) {                                                                 \
        attention_forward<T, D>(q, k, v, qb, kb, vb, o, lse, heads, pixels, d, scale);                               \
    }                                                                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS) attention_backward_kv_##NAME(                              \
        const T* q, const T* k, const T* v, const float* qb, const float* kb, const float* vb, const T* dy,          \
        const float* lse, const float* delta, T* dk, T* dv, int heads, int pixels, int d, float scale) {             \
        attention_backward_kv<T, D>(q, k, v, qb, kb, vb, dy, lse, delta, dk, dv, heads, pixels, d, scale);           \
    }                                                                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS) attention_backward_q_##NAME(                               \
        const T* q, const T* k, const T* v, const float* qb, const float* kb, const float* vb, const T* dy,          \
        const float* lse, const float* delta, T* dq, int heads, int pixels, int d, float scale) {                    \
        attention_backward_q<T, D>(q, k, v, qb, kb, vb, dy, lse, delta, dq, heads, pixels, d, scale);                \
    }
KERNELS(bf16, 16, 16, 6)
KERNELS(bf16, 32, 32, 4)
KERNELS(bf16, 64, 64, 4)
KERNELS(bf16, 128, 128, 2)
// The rows of wider heads would not fit into the registers.
KERNELS(float, f32_16, 16, 4)
KERNELS(float, f32_32, 32, 3)
KERNELS(float, f32_64, 64, 2)
