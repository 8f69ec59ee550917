// Attention over pixels on tensor cores, forward and backward: FlashAttention-2 (Dao 2023, arXiv:2307.08691), whose
// scores never leave the registers.
//
// q, k, v, o and their gradients are (B, T, C) bf16, T pixels, C = heads·d, d a multiple of 8; lse and delta are
// (B, heads, T) f32. The biases (C) f32 of q, k and v, each of which may be null, are added on the way in, and the sum
// is rounded to bf16. The kernels named _D are for d ≤ D and fill up with zeros. All have a grid of (T / 64 rounded up,
// B·heads) and 128 threads, and no dynamic shared memory. Nothing is added up by atomics: the same arguments give the
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
// Tiles have rows of D + 8 values: eight rows then start in different banks, and ldmatrix reads them at once.
#define STRIDE(D) ((D) + 8)
// The columns of scores that backward has in registers at a time.
#define CHUNK(D) ((D) == 128 ? 16 : 32)

// One head of one picture.
struct Head {
    int T, C, d, channel;
    size_t start, row;
    __device__ Head(int heads, int T, int d)
        : T(T), C(heads * d), d(d), channel(blockIdx.y % heads * d),
          start((size_t)(blockIdx.y / heads) * T * C + channel), row((size_t)blockIdx.y * T) {}
};

// Copies rows of a head into a tile, zeros where there are none. A thread always copies the same eight channels, so it
// keeps their biases in registers.
template <int D, bool BIASED> struct Reader {
    static constexpr int V = D / 8, N = ROWS * V / THREADS;
    const bf16* from;
    int C, T;
    float bias[8];
    __device__ Reader(const bf16* x, const float* b, const Head& at)
        : from(x + at.start + threadIdx.x % V * 8), C(at.C), T((int)threadIdx.x % V * 8 < at.d ? at.T : 0), bias{} {
        if (BIASED && T > 0) add_row<8>(b == nullptr ? b : b + at.channel + threadIdx.x % V * 8, bias);
    }
    __device__ __forceinline__ void read(bf16* tile, int first) const {
        // Four loads are on their way at a time; more would not leave the accumulators enough registers.
        constexpr int BATCH = N < 4 ? N : 4;
#pragma unroll
        for (int start = 0; start < N; start += BATCH) {
            uint4 raw[BATCH];
#pragma unroll
            for (int i = 0; i < BATCH; i++) {
                const int r = first + row(start + i);
                raw[i] = make_uint4(0, 0, 0, 0);
                if (r < T) raw[i] = *reinterpret_cast<const uint4*>(from + (size_t)r * C);
            }
#pragma unroll
            for (int i = 0; i < BATCH; i++) {
                const int r = row(start + i);
                if (BIASED && first + r < T)
                    raw[i] = make_uint4(add(raw[i].x, 0), add(raw[i].y, 2), add(raw[i].z, 4), add(raw[i].w, 6));
                *reinterpret_cast<uint4*>(tile + r * STRIDE(D) + threadIdx.x % V * 8) = raw[i];
            }
        }
    }
    static __device__ __forceinline__ int row(int i) { return threadIdx.x / V + i * (THREADS / V); }
    // Two values plus their biases.
    __device__ __forceinline__ uint32_t add(uint32_t pair, int i) const {
        return bf16_pair(__uint_as_float(pair << 16) + bias[i], __uint_as_float(pair & 0xffff0000u) + bias[i + 1]);
    }
};

// A warp's 16 rows as left-hand fragments.
template <int D> __device__ __forceinline__ void fragments(uint32_t (&a)[D / 16][4], const bf16* tile) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < D / 16; k++) ldmatrix_x4(a[k], tile + lane % 16 * STRIDE(D) + 16 * k + lane / 16 * 8);
}

// sums (16×N) += a (16×D)·tileᵀ, N rows of the tile.
template <int D, int N>
__device__ __forceinline__ void times_rows(float (&sums)[N / 8][4], const uint32_t (&a)[D / 16][4], const bf16* tile) {
    const int lane = threadIdx.x % 32;
    tile += (lane / 16 * 8 + lane % 8) * STRIDE(D) + lane / 8 % 2 * 8;
#pragma unroll
    for (int k = 0; k < D / 16; k++)
#pragma unroll
        for (int n = 0; n < N / 16; n++) {
            uint32_t b[4];
            ldmatrix_x4(b, tile + 16 * n * STRIDE(D) + 16 * k);
            mma_bf16(sums[2 * n], a[k], b[0], b[1]);
            mma_bf16(sums[2 * n + 1], a[k], b[2], b[3]);
        }
}

// sums (16×D) += p (16×N)·tile (N×D). As results of products lie in the registers, two neighbouring tiles of p make a
// left-hand fragment.
template <int D, int N>
__device__ __forceinline__ void times_tile(float (&sums)[D / 8][4], const float (&p)[N / 8][4], const bf16* tile) {
    const int lane = threadIdx.x % 32;
    tile += lane % 16 * STRIDE(D) + lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < N / 16; k++) {
        const float(&left)[4] = p[2 * k], (&right)[4] = p[2 * k + 1];
        const uint32_t a[4] = {bf16_pair(left[0], left[1]), bf16_pair(left[2], left[3]), bf16_pair(right[0], right[1]),
                               bf16_pair(right[2], right[3])};
#pragma unroll
        for (int n = 0; n < D / 16; n++) {
            uint32_t b[4];
            ldmatrix_x4_trans(b, tile + 16 * k * STRIDE(D) + 16 * n);
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
    bf16* corner = tile + lane / 4 * STRIDE(D) + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < D / 8; n++) {
        bf16 *above = corner + 8 * n, *below = above + 8 * STRIDE(D);
        *reinterpret_cast<uint32_t*>(above) = bf16_pair(sums[n][0] * upper, sums[n][1] * upper);
        *reinterpret_cast<uint32_t*>(below) = bf16_pair(sums[n][2] * lower, sums[n][3] * lower);
    }
    __syncwarp();
#pragma unroll
    for (int i = lane; i < 16 * (D / 8); i += 32) {
        const int row = i / (D / 8), c = i % (D / 8) * 8;
        if (first + row < at.T && c < at.d)
            *reinterpret_cast<uint4*>(to + at.start + (size_t)(first + row) * at.C + c) =
                *reinterpret_cast<const uint4*>(tile + row * STRIDE(D) + c);
    }
}

// o, and the logarithms of the sums of exp(scores) that backward needs.
template <int D>
__device__ __forceinline__ void attention_forward(const bf16* q, const bf16* k, const bf16* v, const float* qb,
                                                  const float* kb, const float* vb, bf16* o, float* lse, int heads,
                                                  int T, int d, float scale) {
    __shared__ __align__(16) bf16 keys[ROWS * STRIDE(D)];
    __shared__ __align__(16) bf16 values[ROWS * STRIDE(D)];
    const Head at(heads, T, d);
    const int lane = threadIdx.x % 32, own = threadIdx.x / 32 * 16, first = blockIdx.x * ROWS + own;
    uint32_t queries[D / 16][4];
    Reader<D, true>(q, qb, at).read(keys, blockIdx.x * ROWS);
    __syncthreads();
    fragments<D>(queries, keys + own * STRIDE(D));

    const Reader<D, true> of_keys(k, kb, at), of_values(v, vb, at);
    const float to_log2 = scale * LOG2E;
    // A lane sees two rows, lane / 4 and 8 further down; the four lanes of a quad share them.
    float sums[D / 8][4] = {}, most[2] = {-INFINITY, -INFINITY}, total[2] = {};
    for (int start = 0; start < T; start += ROWS) {
        __syncthreads();
        of_keys.read(keys, start);
        of_values.read(values, start);
        __syncthreads();
        if (first >= T) continue;
        float s[ROWS / 8][4] = {};
        times_rows<D, ROWS>(s, queries, keys);
        if (start + ROWS > T)
#pragma unroll
            for (int i = 0; i < ROWS / 2; i++)
                if (start + i / 4 * 8 + lane % 4 * 2 + i % 2 >= T) s[i / 4][i % 4] = -INFINITY;
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
    if (first >= T) return;
#pragma unroll
    for (int row = 0; row < 2; row++) {
        total[row] += __shfl_xor_sync(0xffffffffu, total[row], 1);
        total[row] += __shfl_xor_sync(0xffffffffu, total[row], 2);
        const int query = first + lane / 4 + 8 * row;
        if (lane % 4 == 0 && query < T) lse[at.row + query] = most[row] * scale + logf(total[row]);
    }
    write<D>(sums, 1.0f / total[0], 1.0f / total[1], keys + own * STRIDE(D), o, first, at);
}

// Σ o·dy over a head's channels, of every pixel: what the softmax's gradient subtracts.
extern "C" __global__ void __launch_bounds__(THREADS)
    attention_delta(const bf16* o, const bf16* dy, float* delta, int heads, int T, int d) {
    const Head at(heads, T, d);
    // The lanes of a pixel, a power of two.
    int lanes = 1;
    while (lanes * 8 < d) lanes *= 2;
    const int c = threadIdx.x % lanes * 8;
    for (int i = threadIdx.x / lanes; i < ROWS; i += THREADS / lanes) {
        const int pixel = blockIdx.x * ROWS + i;
        float sum = 0;
        if (pixel < T && c < d) {
            float a[8], b[8];
            Vec<bf16>::load(o + at.start + (size_t)pixel * at.C + c, a);
            Vec<bf16>::load(dy + at.start + (size_t)pixel * at.C + c, b);
#pragma unroll
            for (int j = 0; j < 8; j++) sum += a[j] * b[j];
        }
        for (int offset = lanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
        if (pixel < T && c == 0) delta[at.row + pixel] = sum;
    }
}

// The gradients of keys and values. Here scores stand transposed, a row per key.
template <int D>
__device__ __forceinline__ void attention_backward_kv(const bf16* q, const bf16* k, const bf16* v, const float* qb,
                                                      const float* kb, const float* vb, const bf16* dy,
                                                      const float* lse, const float* delta, bf16* dk, bf16* dv,
                                                      int heads, int T, int d, float scale) {
    __shared__ __align__(16) bf16 queries[ROWS * STRIDE(D)];
    __shared__ __align__(16) bf16 grads[ROWS * STRIDE(D)];
    __shared__ float2 logs[ROWS]; // of every query, lse in units of log 2, and delta
    const Head at(heads, T, d);
    const int lane = threadIdx.x % 32, own = threadIdx.x / 32 * 16, first = blockIdx.x * ROWS + own;
    uint32_t keys[D / 16][4], values[D / 16][4];
    Reader<D, true>(k, kb, at).read(queries, blockIdx.x * ROWS);
    Reader<D, true>(v, vb, at).read(grads, blockIdx.x * ROWS);
    __syncthreads();
    fragments<D>(keys, queries + own * STRIDE(D));
    fragments<D>(values, grads + own * STRIDE(D));

    const Reader<D, true> of_queries(q, qb, at);
    const Reader<D, false> of_grads(dy, nullptr, at);
    const float to_log2 = scale * LOG2E;
    float to_keys[D / 8][4] = {}, to_values[D / 8][4] = {};
    for (int start = 0; start < T; start += ROWS) {
        __syncthreads();
        of_queries.read(queries, start);
        of_grads.read(grads, start);
        if (threadIdx.x < ROWS) {
            const int query = start + threadIdx.x;
            // Where there is no query, exp(−∞) makes its weights 0.
            logs[threadIdx.x] = query < T ? make_float2(lse[at.row + query] * LOG2E, delta[at.row + query])
                                          : make_float2(INFINITY, 0.0f);
        }
        __syncthreads();
        if (first >= T) continue;
#pragma unroll 1
        for (int chunk = 0; chunk < min(ROWS, T - start); chunk += CHUNK(D)) {
            const bf16 *some_queries = queries + chunk * STRIDE(D), *some_grads = grads + chunk * STRIDE(D);
            float p[CHUNK(D) / 8][4] = {}, ds[CHUNK(D) / 8][4] = {};
            times_rows<D, CHUNK(D)>(p, keys, some_queries);
            times_rows<D, CHUNK(D)>(ds, values, some_grads);
#pragma unroll
            for (int i = 0; i < CHUNK(D) / 2; i++) {
                const float2 of = logs[chunk + i / 4 * 8 + lane % 4 * 2 + i % 2];
                float& weight = p[i / 4][i % 4];
                weight = exp2_fast(weight * to_log2 - of.x);
                ds[i / 4][i % 4] = weight * (ds[i / 4][i % 4] - of.y);
            }
            times_tile<D, CHUNK(D)>(to_values, p, some_grads);
            times_tile<D, CHUNK(D)>(to_keys, ds, some_queries);
        }
    }
    __syncthreads();
    if (first >= T) return;
    write<D>(to_keys, scale, scale, queries + own * STRIDE(D), dk, first, at);
    write<D>(to_values, 1.0f, 1.0f, grads + own * STRIDE(D), dv, first, at);
}

// The gradient of the queries.
template <int D>
__device__ __forceinline__ void attention_backward_q(const bf16* q, const bf16* k, const bf16* v, const float* qb,
                                                     const float* kb, const float* vb, const bf16* dy, const float* lse,
                                                     const float* delta, bf16* dq, int heads, int T, int d,
                                                     float scale) {
    __shared__ __align__(16) bf16 keys[ROWS * STRIDE(D)];
    __shared__ __align__(16) bf16 values[ROWS * STRIDE(D)];
    const Head at(heads, T, d);
    const int lane = threadIdx.x % 32, own = threadIdx.x / 32 * 16, first = blockIdx.x * ROWS + own;
    uint32_t queries[D / 16][4], grads[D / 16][4];
    Reader<D, true>(q, qb, at).read(keys, blockIdx.x * ROWS);
    Reader<D, false>(dy, nullptr, at).read(values, blockIdx.x * ROWS);
    __syncthreads();
    fragments<D>(queries, keys + own * STRIDE(D));
    fragments<D>(grads, values + own * STRIDE(D));
    float shift[2], subtract[2];
#pragma unroll
    for (int row = 0; row < 2; row++) {
        const int query = first + lane / 4 + 8 * row;
        shift[row] = query < T ? lse[at.row + query] * LOG2E : INFINITY;
        subtract[row] = query < T ? delta[at.row + query] : 0.0f;
    }

    const Reader<D, true> of_keys(k, kb, at), of_values(v, vb, at);
    const float to_log2 = scale * LOG2E;
    float sums[D / 8][4] = {};
    for (int start = 0; start < T; start += ROWS) {
        __syncthreads();
        of_keys.read(keys, start);
        of_values.read(values, start);
        __syncthreads();
        if (first >= T) continue;
#pragma unroll 1
        for (int chunk = 0; chunk < min(ROWS, T - start); chunk += CHUNK(D)) {
            const bf16 *some_keys = keys + chunk * STRIDE(D), *some_values = values + chunk * STRIDE(D);
            float p[CHUNK(D) / 8][4] = {}, ds[CHUNK(D) / 8][4] = {};
            times_rows<D, CHUNK(D)>(p, queries, some_keys);
            times_rows<D, CHUNK(D)>(ds, grads, some_values);
#pragma unroll
            for (int i = 0; i < CHUNK(D) / 2; i++) {
                const int key = start + chunk + i / 4 * 8 + lane % 4 * 2 + i % 2, row = i / 2 % 2;
                // A key that is none would have weight exp(−lse), which can be infinite.
                const float weight = key < T ? exp2_fast(p[i / 4][i % 4] * to_log2 - shift[row]) : 0.0f;
                ds[i / 4][i % 4] = weight * (ds[i / 4][i % 4] - subtract[row]);
            }
            times_tile<D, CHUNK(D)>(sums, ds, some_keys);
        }
    }
    __syncthreads();
    if (first >= T) return;
    write<D>(sums, scale, scale, keys + own * STRIDE(D), dq, first, at);
}

// AT_ONCE: how many blocks of forward should fit on a multiprocessor; the most that the registers allow.
#define KERNELS(D, AT_ONCE)                                                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS, AT_ONCE) attention_forward_##D(                            \
        const bf16* q, const bf16* k, const bf16* v, const float* qb, const float* kb, const float* vb, bf16* o,     \
        float* lse, int heads, int T, int d, float scale) {                                                          \
        attention_forward<D>(q, k, v, qb, kb, vb, o, lse, heads, T, d, scale);                                       \
    }                                                                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS) attention_backward_kv_##D(                                 \
        const bf16* q, const bf16* k, const bf16* v, const float* qb, const float* kb, const float* vb,              \
        const bf16* dy, const float* lse, const float* delta, bf16* dk, bf16* dv, int heads, int T, int d,           \
        float scale) {                                                                                               \
        attention_backward_kv<D>(q, k, v, qb, kb, vb, dy, lse, delta, dk, dv, heads, T, d, scale);                   \
    }                                                                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS) attention_backward_q_##D(                                  \
        const bf16* q, const bf16* k, const bf16* v, const float* qb, const float* kb, const float* vb,              \
        const bf16* dy, const float* lse, const float* delta, bf16* dq, int heads, int T, int d, float scale) {      \
        attention_backward_q<D>(q, k, v, qb, kb, vb, dy, lse, delta, dq, heads, T, d, scale);                        \
    }
KERNELS(16, 6)
KERNELS(32, 4)
KERNELS(64, 4)
KERNELS(128, 2)
