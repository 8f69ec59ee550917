// What an optimiser does to all tensors of a network at once: the norm of the gradient, AdamW, the moving average. As in
// PyTorch's fused optimisers, a kernel is launched once for all of them and finds them by a table of addresses; a block
// takes one chunk of one tensor. Everything is f32. Nothing here waits for the host: what is not to happen after a loss
// or gradient that is not finite is left undone by the kernels themselves, which read the norm.
#include "common.cuh"

// Values in a chunk, and threads of a block; optimizer.rs has the same.
#define CHUNK 8192
#define THREADS 256
#define THREADS_OF_NORM 1024

// One tensor: how many chunks come before its own, its length, and the addresses of what belongs together.
struct Row {
    int64_t first_chunk, len;
    float* tensors[3];
};

// This block's chunk: its row, where in the tensors it starts, and its length.
struct Chunk {
    const Row* row;
    int64_t start;
    int len;

    // By halving: the last row that starts at or before this block's chunk. (An empty tensor shares its start with the
    // next, so it is never the last.)
    __device__ __forceinline__ Chunk(const Row* rows, int n_rows) {
        int low = 0, high = n_rows - 1;
        while (low < high) {
            const int middle = (low + high + 1) / 2;
            if (rows[middle].first_chunk <= (int64_t)blockIdx.x) low = middle;
            else high = middle - 1;
        }
        row = rows + low;
        start = ((int64_t)blockIdx.x - row->first_chunk) * CHUNK;
        const int64_t left = row->len - start;
        len = left < CHUNK ? (int)left : CHUNK;
    }

    __device__ __forceinline__ float* values(int tensor) const { return row->tensors[tensor] + start; }
};

template <int N> __device__ __forceinline__ void load_run(const float* p, float (&v)[N]) {
    if constexpr (N == 4) Vec<float>::load(p, v);
    else v[0] = *p;
}
template <int N> __device__ __forceinline__ void store_run(float* p, const float (&v)[N]) {
    if constexpr (N == 4) Vec<float>::store(p, v);
    else *p = v[0];
}

// Whether all of them may be read four values at a time.
template <typename... P> __device__ __forceinline__ bool aligned(P*... p) {
    return (((uint64_t)p | ...) & 15) == 0;
}

// Has `work` do every value of a chunk: four neighbours at a time where `by_four`, and the rest one by one.
template <typename Work> __device__ __forceinline__ void over(int len, bool by_four, Work& work) {
    const int whole = by_four ? len / 4 * 4 : 0;
    for (int i = 4 * threadIdx.x; i < whole; i += 4 * THREADS) work.template run<4>(i);
    for (int i = whole + threadIdx.x; i < len; i += THREADS) work.template run<1>(i);
}

// The sum over a block of `blockDim.x` threads, a power of two, for thread 0. The order is fixed.
template <typename T> __device__ __forceinline__ T sum_of_block(T own, T* scratch) {
    scratch[threadIdx.x] = own;
    for (int half = blockDim.x / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) scratch[threadIdx.x] += scratch[threadIdx.x + half];
    }
    return scratch[0];
}

struct Squares {
    const float* x;
    float sum;

    template <int N> __device__ __forceinline__ void run(int i) {
        float v[N];
        load_run(x + i, v);
#pragma unroll
        for (int j = 0; j < N; j++) sum += v[j] * v[j];
    }
};

// The sum of squares of every chunk of the third tensors, the gradients: partial (chunks).
extern "C" __global__ void __launch_bounds__(THREADS)
    gradient_squares(const Row* rows, int n_rows, float* partial) {
    __shared__ float scratch[THREADS];
    const Chunk chunk(rows, n_rows);
    Squares work{chunk.values(2), 0};
    over(chunk.len, aligned(work.x), work);
    const float sum = sum_of_block(work.sum, scratch);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// The norm from the sums of chunks, in f64. One that is not finite comes of a `guard` that is not, whatever the sums.
extern "C" __global__ void __launch_bounds__(THREADS_OF_NORM)
    gradient_norm(const float* partial, int n, const float* guard, float* norm) {
    __shared__ double scratch[THREADS_OF_NORM];
    double own = 0;
    for (int i = threadIdx.x; i < n; i += THREADS_OF_NORM) own += partial[i];
    const double sum = sum_of_block(own, scratch);
    if (threadIdx.x == 0) *norm = (float)sqrt(sum) + 0.0f * *guard;
}

// Whether an update is to be made; a norm is never negative.
__device__ __forceinline__ bool is_finite(float norm) { return norm < INFINITY; }

struct Adamw {
    float *weights, *mean, *square;
    const float* grad;
    float scale, b1, b2, to_mean, to_square, rate, root_scale, keep, eps;

    template <int N> __device__ __forceinline__ void run(int i) {
        float p[N], m[N], v[N], g[N];
        load_run(weights + i, p), load_run(mean + i, m), load_run(square + i, v), load_run(grad + i, g);
#pragma unroll
        for (int j = 0; j < N; j++) {
            const float clipped = g[j] * scale;
            m[j] = m[j] * b1 + clipped * to_mean;
            v[j] = v[j] * b2 + clipped * clipped * to_square;
            p[j] = p[j] * keep - m[j] * rate / (sqrtf(v[j]) * root_scale + eps);
        }
        store_run(weights + i, p), store_run(mean + i, m), store_run(square + i, v);
    }
};

// AdamW, as adamw.rs has it, on rows of weights, moments (means, then mean squares) and gradients. Gradients longer than
// `clip` are scaled down to it.
extern "C" __global__ void __launch_bounds__(THREADS)
    adamw(const Row* rows, int n_rows, const float* norm, float clip, float b1, float b2, float to_mean, float to_square,
          float rate, float root_scale, float keep, float eps) {
    const float length = *norm;
    if (!is_finite(length)) return;
    const Chunk chunk(rows, n_rows);
    float *weights = chunk.values(0), *mean = chunk.values(1), *square = mean + chunk.row->len;
    const float* grad = chunk.values(2);
    const float scale = length > clip ? clip / length : 1.0f;
    Adamw work{weights, mean, square, grad, scale, b1, b2, to_mean, to_square, rate, root_scale, keep, eps};
    over(chunk.len, aligned(weights, mean, square, grad), work);
}

struct Average {
    float* average;
    const float* value;
    float share;

    template <int N> __device__ __forceinline__ void run(int i) {
        float a[N], v[N];
        load_run(average + i, a), load_run(value + i, v);
#pragma unroll
        for (int j = 0; j < N; j++) a[j] += (v[j] - a[j]) * share;
        store_run(average + i, a);
    }
};

// average += (value − average)·share, on rows of averages and values, unless the update of the values was not made.
extern "C" __global__ void __launch_bounds__(THREADS)
    average(const Row* rows, int n_rows, const float* norm, float share) {
    if (!is_finite(*norm)) return;
    const Chunk chunk(rows, n_rows);
    Average work{chunk.values(0), chunk.values(1), share};
    over(chunk.len, aligned(work.average, work.value), work);
}
