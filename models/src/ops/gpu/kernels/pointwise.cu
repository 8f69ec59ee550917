// What lies between convolutions: changes of layout, sums of two maps, joining and splitting, doubling, and sums over
// pixels. Pictures are (B, pixels, C), C whole vectors unless said otherwise; a bias that a convolution has left to its
// reader is (1 or B, C) f32, its stride 0 or C.
#include "common.cuh"

// Everything is counted in 32 bits, whose divisions are several times as fast as those of 64; the host refuses larger maps.
#define INDEX (blockIdx.x * blockDim.x + threadIdx.x)

// f32 (B, c, pixels) to T (B, pixels, padded), zeros beyond c.
template <typename T>
__device__ void to_channels_last(const float* x, T* y, int pixels, int c, int padded, uint32_t total) {
    const uint32_t i = INDEX;
    if (i >= total) return;
    const uint32_t channel = i % padded, pixel = i / padded % pixels, n = i / padded / pixels;
    store(y + i, channel < c ? x[(n * c + channel) * pixels + pixel] : 0.0f);
}
#define TO(T) (const float* x, T* y, int pixels, int c, int padded, uint32_t total)
FOR_BOTH(to_channels_last, TO, (x, y, pixels, c, padded, total))

// T (B, pixels, padded) plus bias to f32 (B, c, pixels).
template <typename T>
__device__ void from_channels_last(const T* x, const float* bias, int bias_stride, float* y, int pixels, int c,
                                   int padded, uint32_t total) {
    const uint32_t i = INDEX;
    if (i >= total) return;
    const uint32_t pixel = i % pixels, channel = i / pixels % c, n = i / pixels / c;
    const float b = bias == nullptr ? 0.0f : bias[n * bias_stride + channel];
    y[i] = load(x + (n * pixels + pixel) * padded + channel) + b;
}
#define FROM(T) (const T* x, const float* bias, int bias_stride, float* y, int pixels, int c, int padded, uint32_t total)
FOR_BOTH(from_channels_last, FROM, (x, bias, bias_stride, y, pixels, c, padded, total))

// Weights f32 (o, c, taps) to T (padded_o, taps, padded_c), zeros where there are none.
template <typename T>
__device__ void pack(const float* w, T* to, int o, int c, int taps, int padded_c, uint32_t total) {
    const uint32_t i = INDEX;
    if (i >= total) return;
    const uint32_t channel = i % padded_c, tap = i / padded_c % taps, out = i / padded_c / taps;
    store(to + i, out < o && channel < c ? w[(out * c + channel) * taps + tap] : 0.0f);
}
#define PACK(T) (const float* w, T* to, int o, int c, int taps, int padded_c, uint32_t total)
FOR_BOTH(pack, PACK, (w, to, o, c, taps, padded_c, total))

// And their gradient back, f32 (o, c, taps).
template <typename T>
__device__ void unpack(const T* from, float* w, int c, int taps, int padded_c, uint32_t total) {
    const uint32_t i = INDEX;
    if (i >= total) return;
    const uint32_t tap = i % taps, channel = i / taps % c, out = i / taps / c;
    w[i] = load(from + (out * taps + tap) * padded_c + channel);
}
#define UNPACK(T) (const T* from, float* w, int c, int taps, int padded_c, uint32_t total)
FOR_BOTH(unpack, UNPACK, (from, w, c, taps, padded_c, total))

// The vector's first channel, and the row of `bias` that goes with it.
struct Spot {
    uint32_t c, n;
    __device__ Spot(uint32_t vector, uint32_t N, uint32_t C, uint32_t per_picture) : c(vector * N % C), n(vector * N / per_picture) {}
    __device__ const float* row(const float* bias, int stride) const {
        return bias == nullptr ? nullptr : bias + n * stride + c;
    }
};

// z = (x + x_bias) + (y + y_bias); y may be absent.
template <typename T>
__device__ void add(const T* x, const float* x_bias, int x_stride, const T* y, const float* y_bias, int y_stride, T* z,
                    int C, uint32_t per_picture, uint32_t vectors) {
    constexpr int N = Vec<T>::N;
    const uint32_t i = INDEX;
    if (i >= vectors) return;
    const Spot at(i, N, C, per_picture);
    float a[N], b[N] = {};
    Vec<T>::load(x + i * N, a);
    add_row<N>(at.row(x_bias, x_stride), a);
    if (y != nullptr) Vec<T>::load(y + i * N, b);
    add_row<N>(at.row(y_bias, y_stride), b);
#pragma unroll
    for (int k = 0; k < N; k++) a[k] += b[k];
    Vec<T>::store(z + i * N, a);
}
#define ADD(T)                                                                                                      \
    (const T* x, const float* x_bias, int x_stride, const T* y, const float* y_bias, int y_stride, T* z, int C,     \
     uint32_t per_picture, uint32_t vectors)
FOR_BOTH(add, ADD, (x, x_bias, x_stride, y, y_bias, y_stride, z, C, per_picture, vectors))

// Joins (B, pixels, C1) and (B, pixels, C2) to (B, pixels, C1 + C2).
template <typename T>
__device__ void concat(const T* x, const float* x_bias, int x_stride, const T* y, const float* y_bias, int y_stride,
                       T* z, int C1, int C2, int pixels, uint32_t vectors) {
    constexpr int N = Vec<T>::N;
    const uint32_t i = INDEX;
    if (i >= vectors) return;
    const int C = C1 + C2;
    const uint32_t c = i * N % C, pixel = i * N / C, n = pixel / pixels;
    float v[N];
    if (c < C1) {
        Vec<T>::load(x + pixel * C1 + c, v);
        add_row<N>(x_bias == nullptr ? nullptr : x_bias + n * x_stride + c, v);
    } else {
        Vec<T>::load(y + pixel * C2 + c - C1, v);
        add_row<N>(y_bias == nullptr ? nullptr : y_bias + n * y_stride + c - C1, v);
    }
    Vec<T>::store(z + i * N, v);
}
#define CONCAT(T)                                                                                                   \
    (const T* x, const float* x_bias, int x_stride, const T* y, const float* y_bias, int y_stride, T* z, int C1,    \
     int C2, int pixels, uint32_t vectors)
FOR_BOTH(concat, CONCAT, (x, x_bias, x_stride, y, y_bias, y_stride, z, C1, C2, pixels, vectors))

// And takes them apart again.
template <typename T> __device__ void split(const T* z, T* x, T* y, int C1, int C2, uint32_t vectors) {
    constexpr int N = Vec<T>::N;
    const uint32_t i = INDEX;
    if (i >= vectors) return;
    const int C = C1 + C2;
    const uint32_t c = i * N % C, pixel = i * N / C;
    float v[N];
    Vec<T>::load(z + i * N, v);
    Vec<T>::store(c < C1 ? x + pixel * C1 + c : y + pixel * C2 + c - C1, v);
}
#define SPLIT(T) (const T* z, T* x, T* y, int C1, int C2, uint32_t vectors)
FOR_BOTH(split, SPLIT, (z, x, y, C1, C2, vectors))

// Nearest neighbour: (B, h, w, C) plus bias to (B, 2h, 2w, C).
template <typename T>
__device__ void upsample(const T* x, const float* bias, int bias_stride, T* y, int h, int w, int C, uint32_t vectors) {
    constexpr int N = Vec<T>::N;
    const uint32_t i = INDEX;
    if (i >= vectors) return;
    const uint32_t c = i * N % C, pixel = i * N / C;
    const uint32_t column = pixel % (2 * w), row = pixel / (2 * w) % (2 * h), n = pixel / (2 * w) / (2 * h);
    float v[N];
    Vec<T>::load(x + ((n * h + row / 2) * w + column / 2) * C + c, v);
    add_row<N>(bias == nullptr ? nullptr : bias + n * bias_stride + c, v);
    Vec<T>::store(y + i * N, v);
}
#define UPSAMPLE(T) (const T* x, const float* bias, int bias_stride, T* y, int h, int w, int C, uint32_t vectors)
FOR_BOTH(upsample, UPSAMPLE, (x, bias, bias_stride, y, h, w, C, vectors))

// The sum of every block of 2×2: dy (B, 2h, 2w, C) to dx (B, h, w, C).
template <typename T> __device__ void upsample_backward(const T* dy, T* dx, int h, int w, int C, uint32_t vectors) {
    constexpr int N = Vec<T>::N;
    const uint32_t i = INDEX;
    if (i >= vectors) return;
    const uint32_t c = i * N % C, pixel = i * N / C, column = pixel % w, row = pixel / w % h, n = pixel / w / h;
    float sum[N] = {};
    for (int corner = 0; corner < 4; corner++) {
        float v[N];
        Vec<T>::load(dy + ((n * 2 * h + 2 * row + corner / 2) * 2 * w + 2 * column + corner % 2) * C + c, v);
#pragma unroll
        for (int k = 0; k < N; k++) sum[k] += v[k];
    }
    Vec<T>::store(dx + i * N, sum);
}
#define UPSAMPLE_BACKWARD(T) (const T* dy, T* dx, int h, int w, int C, uint32_t vectors)
FOR_BOTH(upsample_backward, UPSAMPLE_BACKWARD, (dy, dx, h, w, C, vectors))

// Sums over rows, (G, rows, C) to f32 (G, C), in two steps and always in the same order. The first: grid (tiles of 32
// runs of channels, parts of the rows, G), 256 threads, partial (G, parts, C).
#define SUM_WARPS 8
template <typename T>
__device__ void sums_of_parts(const T* x, float* partial, int rows, int C, int V, int rows_of_part) {
    constexpr int N = Vec<T>::N;
    __shared__ float scratch[SUM_WARPS][32 * N];
    const int run = threadIdx.x % V, lane = threadIdx.x / V, lanes = blockDim.x / V;
    const int first = blockIdx.x * V * N, c = first + run * N;
    const int start = blockIdx.y * rows_of_part, end = min(rows, start + rows_of_part);
    float own[N] = {};
    if (c < C)
        for (int r = start + lane; r < end; r += lanes) {
            float v[N];
            Vec<T>::load(x + ((size_t)blockIdx.z * rows + r) * C + c, v);
#pragma unroll
            for (int k = 0; k < N; k++) own[k] += v[k];
        }
#pragma unroll
    for (int k = 0; k < N; k++)
        for (int offset = V; offset < 32; offset *= 2) own[k] += __shfl_xor_sync(0xffffffffu, own[k], offset);
    if (threadIdx.x % 32 < V)
        for (int k = 0; k < N; k++) scratch[threadIdx.x / 32][threadIdx.x % 32 * N + k] = own[k];
    __syncthreads();
    for (int i = threadIdx.x; i < V * N && first + i < C; i += blockDim.x) {
        float sum = 0;
        for (int warp = 0; warp < SUM_WARPS; warp++) sum += scratch[warp][i];
        partial[((size_t)blockIdx.z * gridDim.y + blockIdx.y) * C + first + i] = sum;
    }
}
#define SUMS(T) (const T* x, float* partial, int rows, int C, int V, int rows_of_part)
FOR_BOTH(sums_of_parts, SUMS, (x, partial, rows, C, V, rows_of_part))

// The second: grid (tiles of 32 channels, 1, G), 256 threads; partial (G, parts, C) to sums (G, C).
extern "C" __global__ void sum_of_parts(const float* partial, float* sums, int parts, int C) {
    __shared__ float scratch[SUM_WARPS][32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, c = blockIdx.x * 32 + lane;
    float own = 0;
    if (c < C)
        for (int part = warp; part < parts; part += SUM_WARPS) own += partial[((size_t)blockIdx.z * parts + part) * C + c];
    scratch[warp][lane] = own;
    __syncthreads();
    if (warp != 0 || c >= C) return;
    float sum = 0;
    for (int w = 0; w < SUM_WARPS; w++) sum += scratch[w][lane];
    sums[(size_t)blockIdx.z * C + c] = sum;
}
