// Group norm, with SiLU or without, forward and backward, over pictures (B, pixels, C). A block owns a slab of channels
// of one picture, whole groups all: it goes through its pixels twice, and finds them in the cache the second time. So a
// pass costs one reading and one writing of device memory.
//
// A bias that a convolution has left to its reader is added on the way in: `bias` (1 or B, C), `bias_stride` 0 or C.
#include "common.cuh"

// The threads of a block: V (a power of two, at most 32) runs of channels, times lanes over pixels.
struct Place {
    int run, lane, lanes;
    __device__ explicit Place(int V) : run(threadIdx.x % V), lane(threadIdx.x / V), lanes(blockDim.x / V) {}
};

// Sums over lanes: sums[0..COUNT][channel of the slab] afterwards, for everybody. `scratch` holds a row per warp.
template <int COUNT, int N>
__device__ void sum_over_lanes(float (&own)[COUNT][N], int V, int slab, float* scratch, float* sums) {
#pragma unroll
    for (int k = 0; k < COUNT; k++)
#pragma unroll
        for (int i = 0; i < N; i++)
            for (int offset = V; offset < 32; offset *= 2) own[k][i] += __shfl_xor_sync(0xffffffffu, own[k][i], offset);
    const int width = V * N, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    if (threadIdx.x % 32 < V) {
        for (int k = 0; k < COUNT; k++)
            for (int i = 0; i < N; i++) scratch[(warp * COUNT + k) * width + threadIdx.x % 32 * N + i] = own[k][i];
    }
    __syncthreads();
    for (int j = threadIdx.x; j < COUNT * slab; j += blockDim.x) {
        const int k = j / slab, c = j % slab;
        float sum = 0;
        for (int w = 0; w < warps; w++) sum += scratch[(w * COUNT + k) * width + c];
        sums[j] = sum;
    }
    __syncthreads();
}

// The most channels of a slab, and threads of a block: few enough that several blocks share a multiprocessor, so that
// one reads while another sums up.
#define MAX_SLAB 256
#define MAX_THREADS 256
#define MAX_WARPS (MAX_THREADS / 32)

// With the exponential and the division of the special function unit: exact ones would cost more than the memory.
__device__ __forceinline__ float sigmoid(float z) { return __fdividef(1.0f, 1.0f + __expf(-z)); }

// y = act((x + bias − mean)·rstd·weight + beta); stats (B, groups, 2) are mean and rstd.
template <typename T>
__device__ void group_norm_forward(const T* x, const float* bias, int bias_stride, const float* weight,
                                   const float* beta, T* y, float* stats, int pixels, int C, int per_group, int slab,
                                   int V, float eps, int silu) {
    constexpr int N = Vec<T>::N;
    __shared__ float scratch[MAX_WARPS * 2 * 32 * N];
    __shared__ float sums[2 * MAX_SLAB];
    __shared__ float origin[MAX_SLAB];
    __shared__ float group[2 * MAX_SLAB];
    const Place at(V);
    const int n = blockIdx.y, first = blockIdx.x * slab, here = min(slab, C - first), c = first + at.run * N;
    const bool active = at.run * N < here;
    const T* in = x + (size_t)n * pixels * C + c;
    T* out = y + (size_t)n * pixels * C + c;

    // Sums of distances from the first pixel, since squares of values far from zero would lose what they differ by.
    float start[N], own[2][N] = {};
    if (active) {
        Vec<T>::load(in, start);
#pragma unroll 4
        for (int p = at.lane; p < pixels; p += at.lanes) {
            float v[N];
            Vec<T>::load(in + (size_t)p * C, v);
#pragma unroll
            for (int i = 0; i < N; i++) v[i] -= start[i], own[0][i] += v[i], own[1][i] += v[i] * v[i];
        }
        add_row<N>(bias == nullptr ? nullptr : bias + (size_t)n * bias_stride + c, start);
        if (at.lane == 0)
            for (int i = 0; i < N; i++) origin[at.run * N + i] = start[i];
    }
    sum_over_lanes<2, N>(own, V, slab, scratch, sums);
    for (int g = threadIdx.x; g < here / per_group; g += blockDim.x) {
        const float count = (float)per_group * pixels;
        float mean = 0, squares = 0;
        for (int i = g * per_group; i < (g + 1) * per_group; i++) mean += sums[i] / count + origin[i] / per_group;
        for (int i = g * per_group; i < (g + 1) * per_group; i++) {
            const float off = origin[i] - mean;
            squares += sums[slab + i] + off * (2 * sums[i] + off * pixels);
        }
        const float rstd = rsqrtf(fmaxf(squares / count, 0.0f) + eps);
        group[2 * g] = mean, group[2 * g + 1] = rstd;
        float* to = stats + 2 * ((size_t)n * (C / per_group) + first / per_group + g);
        to[0] = mean, to[1] = rstd;
    }
    __syncthreads();
    if (!active) return;
    float scale[N], shift[N] = {};
    add_row<N>(bias == nullptr ? nullptr : bias + (size_t)n * bias_stride + c, shift);
#pragma unroll
    for (int i = 0; i < N; i++) {
        const int g = (at.run * N + i) / per_group;
        scale[i] = group[2 * g + 1] * weight[c + i];
        shift[i] = (shift[i] - group[2 * g]) * scale[i] + beta[c + i];
    }
#pragma unroll 4
    for (int p = at.lane; p < pixels; p += at.lanes) {
        float v[N];
        Vec<T>::load(in + (size_t)p * C, v);
#pragma unroll
        for (int i = 0; i < N; i++) {
            v[i] = v[i] * scale[i] + shift[i];
            if (silu) v[i] *= sigmoid(v[i]);
        }
        Vec<T>::store(out + (size_t)p * C, v);
    }
}

// dx, plus `existing` where x has a gradient already; sums (3, B, C): Σ dz·x̂, Σ dz and Σ dx over the pixels, the
// gradients of weight, of beta and of a bias, picture by picture (the last only where there is a bias).
template <typename T>
__device__ void group_norm_backward(const T* x, const float* bias, int bias_stride, const float* weight,
                                    const float* beta, const float* stats, const T* dy, const T* existing, T* dx,
                                    float* totals, int pixels, int C, int per_group, int slab, int V, int silu) {
    constexpr int N = Vec<T>::N;
    __shared__ float scratch[MAX_WARPS * 2 * 32 * N];
    __shared__ float sums[2 * MAX_SLAB];
    __shared__ float group[2 * MAX_SLAB];
    const Place at(V);
    const int n = blockIdx.y, first = blockIdx.x * slab, here = min(slab, C - first), c = first + at.run * N;
    const bool active = at.run * N < here;
    const size_t start = (size_t)n * pixels * C + c, batch = gridDim.y;
    const float* row = bias == nullptr ? nullptr : bias + (size_t)n * bias_stride + c;

    // With d = x + to_centre, x̂ = d·rstd and z = d·scale + b.
    float to_centre[N] = {}, scale[N], b[N], rstd[N];
    if (active) {
        add_row<N>(row, to_centre);
#pragma unroll
        for (int i = 0; i < N; i++) {
            const float* of = stats + 2 * ((size_t)n * (C / per_group) + (c + i) / per_group);
            rstd[i] = of[1], to_centre[i] -= of[0], scale[i] = of[1] * weight[c + i], b[i] = beta[c + i];
        }
    }
    // The gradient of z, and d.
    auto read = [&](int p, float* dz, float* d) {
        Vec<T>::load(x + start + (size_t)p * C, d);
        Vec<T>::load(dy + start + (size_t)p * C, dz);
#pragma unroll
        for (int i = 0; i < N; i++) {
            d[i] += to_centre[i];
            if (silu) {
                const float z = d[i] * scale[i] + b[i], s = sigmoid(z);
                dz[i] *= s * (1.0f + z * (1.0f - s));
            }
        }
    };
    float own[2][N] = {};
    if (active) {
#pragma unroll 2
        for (int p = at.lane; p < pixels; p += at.lanes) {
            float dz[N], d[N];
            read(p, dz, d);
#pragma unroll
            for (int i = 0; i < N; i++) own[0][i] += dz[i] * d[i], own[1][i] += dz[i];
        }
#pragma unroll
        for (int i = 0; i < N; i++) own[0][i] *= rstd[i];
    }
    sum_over_lanes<2, N>(own, V, slab, scratch, sums);
    for (int j = threadIdx.x; j < 2 * here; j += blockDim.x) {
        const int k = j / here, i = j % here;
        totals[(k * batch + n) * C + first + i] = sums[k * slab + i];
    }
    for (int g = threadIdx.x; g < here / per_group; g += blockDim.x) {
        float along = 0, sum = 0;
        for (int i = g * per_group; i < (g + 1) * per_group; i++)
            along += sums[i] * weight[first + i], sum += sums[slab + i] * weight[first + i];
        const float count = (float)per_group * pixels;
        group[2 * g] = along / count, group[2 * g + 1] = sum / count;
    }
    __syncthreads();
    float of_bias[1][N] = {};
    if (active) {
        // dx = rstd·(dz·w − mean(dz·w) − x̂·mean(dz·w·x̂)).
        float along[N], mean[N];
#pragma unroll
        for (int i = 0; i < N; i++) {
            const int g = (at.run * N + i) / per_group;
            along[i] = group[2 * g] * rstd[i] * rstd[i], mean[i] = group[2 * g + 1] * rstd[i];
        }
#pragma unroll 2
        for (int p = at.lane; p < pixels; p += at.lanes) {
            float dz[N], d[N];
            read(p, dz, d);
#pragma unroll
            for (int i = 0; i < N; i++) {
                dz[i] = dz[i] * scale[i] - mean[i] - d[i] * along[i];
                of_bias[0][i] += dz[i];
            }
            if (existing != nullptr) {
                Vec<T>::load(existing + start + (size_t)p * C, d);
#pragma unroll
                for (int i = 0; i < N; i++) dz[i] += d[i];
            }
            Vec<T>::store(dx + start + (size_t)p * C, dz);
        }
    }
    if (bias == nullptr) return;
    sum_over_lanes<1, N>(of_bias, V, slab, scratch, sums);
    for (int i = threadIdx.x; i < here; i += blockDim.x) totals[(2 * batch + n) * C + first + i] = sums[i];
}

#define FORWARD(T)                                                                                                 \
    (const T* x, const float* bias, int bias_stride, const float* weight, const float* beta, T* y, float* stats,    \
     int pixels, int C, int per_group, int slab, int V, float eps, int silu)
FOR_BOTH(group_norm_forward, FORWARD,
         (x, bias, bias_stride, weight, beta, y, stats, pixels, C, per_group, slab, V, eps, silu))

#define BACKWARD(T)                                                                                                \
    (const T* x, const float* bias, int bias_stride, const float* weight, const float* beta, const float* stats,    \
     const T* dy, const T* existing, T* dx, float* totals, int pixels, int C, int per_group, int slab, int V, int silu)
FOR_BOTH_WITHIN(__launch_bounds__(MAX_THREADS, 3), group_norm_backward, BACKWARD,
         (x, bias, bias_stride, weight, beta, stats, dy, existing, dx, totals, pixels, C, per_group, slab, V, silu))
