// Compares the kernels of pointwise.cu, run by the emulator, with plain loops in f64.
//
//     g++ -std=c++20 -O1 -fno-strict-aliasing pointwise_test.cpp -o /tmp/pointwise_test && /tmp/pointwise_test
#define DMD_EMULATOR
#include "cuda_emulator.h"

#include "../../src/ops/gpu/kernels/pointwise.cu"

#include <random>

using dmd_emulator::Array;
using Doubles = std::vector<double>;

static int passed = 0, failed = 0;
static std::mt19937 rng(7);

template <class T> Array<T> normal(size_t count) {
    Array<T> x(count);
    std::normal_distribution<float> of(0.1, 1);
    for (T& v : x) v = T(of(rng));
    return x;
}

// The larger of ‖x − reference‖ / ‖reference‖ and that of a single value, to its reference plus the root of the mean
// square of all. Infinite where anything is NaN.
template <class X> double distance(X& x, const Doubles& reference) {
    double error = 0, norm = 0, worst = 0;
    for (double r : reference) norm += r * r;
    const double rms = std::sqrt(norm / reference.size());
    for (size_t i = 0; i < reference.size(); i++) {
        const double e = std::abs((double)x[i] - reference[i]);
        if (std::isnan(e)) return INFINITY;
        error += e * e, worst = std::max(worst, e / (std::abs(reference[i]) + rms));
    }
    return std::max(std::sqrt(error / norm), worst);
}

template <class T> constexpr bool IS_F32 = std::is_same_v<T, float>;
template <class T> constexpr double TOLERANCE = IS_F32<T> ? 1e-5 : 1e-2;

// What run(to) writes, against the reference and whatever the order of threads.
template <class Out> void check(const char* name, const Doubles& reference, double most, auto run) {
    Array<Out> out(reference.size()), again(reference.size());
    for (Array<Out>* to : {&out, &again}) {
        dmd_emulator::backwards = to == &again;
        run(to->data());
    }
    const double error = distance(out, reference);
    const bool same = std::memcmp(out.data(), again.data(), out.size() * sizeof(Out)) == 0;
    std::printf(" %s %.1e", name, error);
    if (error > most) std::printf(" (MORE THAN %.0e)", most);
    if (!same) std::printf(" (DEPENDS ON THE ORDER OF THREADS)");
    (error <= most && same ? passed : failed)++;
}

template <class T> auto of_type(auto f32, auto bf16) {
    if constexpr (IS_F32<T>)
        return f32;
    else
        return bf16;
}
#define KERNEL(name) of_type<T>(name##_f32, name##_bf16)

// One thread per item: Grid::over in ops/gpu/mod.rs.
static void over(size_t items, auto kernel, auto... args) {
    launch(kernel, dim3((items + 255) / 256), 256, 0, args...);
}

// As (rows, C) of f32, 0 rows for none.
struct Bias {
    int rows, C;
    Array<float> values;
    Bias(int rows, int C) : rows(rows), C(C), values(normal<float>((size_t)rows * C)) {}
    const float* data() { return rows ? values.data() : nullptr; }
    int stride() const { return rows > 1 ? C : 0; }
    double of(int n, int c) { return rows ? values[n * stride() + c] : 0; }
};

template <class T> void layouts(int B, int c, int pixels, int padded) {
    std::printf("%s B %d c %2d pixels %2d padded %2d:", of_type<T>("f32 ", "bf16"), B, c, pixels, padded);
    Array<float> x = normal<float>((size_t)B * c * pixels);
    Doubles there((size_t)B * pixels * padded);
    for (int n = 0; n < B; n++)
        for (int k = 0; k < c; k++)
            for (int p = 0; p < pixels; p++) there[(n * pixels + p) * padded + k] = x[(n * c + k) * pixels + p];
    check<T>("to_channels_last", there, TOLERANCE<T>, [&](T* to) {
        over(there.size(), KERNEL(to_channels_last), x.data(), to, pixels, c, padded, there.size());
    });
    Array<T> last = normal<T>(there.size()); // Its padding is no zeros.
    for (int rows : {0, 1, B})
        for (int width : {c, padded}) {
            Bias bias(rows, width);
            Doubles back((size_t)B * c * pixels);
            for (int n = 0; n < B; n++)
                for (int k = 0; k < c; k++)
                    for (int p = 0; p < pixels; p++)
                        back[(n * c + k) * pixels + p] = (double)last[(n * pixels + p) * padded + k] + bias.of(n, k);
            check<float>("from_channels_last", back, 1e-5, [&](float* to) {
                over(back.size(), KERNEL(from_channels_last), last.data(), bias.data(), bias.stride(), to, pixels, c,
                     padded, back.size());
            });
        }
    std::printf("\n");
}

template <class T> void weights(int o, int c, int taps, int padded_o, int padded_c) {
    std::printf("%s o %2d of %2d c %2d of %2d taps %2d:", of_type<T>("f32 ", "bf16"), o, padded_o, c, padded_c, taps);
    Array<float> w = normal<float>((size_t)o * c * taps);
    Doubles packed((size_t)padded_o * taps * padded_c), back(w.size());
    Array<T> dw = normal<T>(packed.size());
    for (int i = 0; i < o; i++)
        for (int k = 0; k < c; k++)
            for (int tap = 0; tap < taps; tap++) {
                packed[(i * taps + tap) * padded_c + k] = w[(i * c + k) * taps + tap];
                back[(i * c + k) * taps + tap] = dw[(i * taps + tap) * padded_c + k];
            }
    check<T>("pack", packed, TOLERANCE<T>, [&](T* to) {
        over(packed.size(), KERNEL(pack), w.data(), to, o, c, taps, padded_c, packed.size());
    });
    check<float>("unpack", back, 1e-5, [&](float* to) {
        over(back.size(), KERNEL(unpack), dw.data(), to, c, taps, padded_c, back.size());
    });
    std::printf("\n");
}

template <class T> void additions(int B, int pixels, int C) {
    if (C % Vec<T>::N) return;
    std::printf("%s B %d pixels %2d C %2d:", of_type<T>("f32 ", "bf16"), B, pixels, C);
    const size_t values = (size_t)B * pixels * C, vectors = values / Vec<T>::N;
    Array<T> x = normal<T>(values), y = normal<T>(values);
    for (bool both : {true, false})
        for (int x_rows : {0, 1, B})
            for (int y_rows : {0, 1, B}) {
                if (!both && y_rows) continue;
                Bias x_bias(x_rows, C), y_bias(y_rows, C);
                Doubles sum(values);
                for (size_t i = 0; i < values; i++) {
                    const int n = i / C / pixels, c = i % C;
                    sum[i] = (double)x[i] + x_bias.of(n, c) + (both ? (double)y[i] : 0) + y_bias.of(n, c);
                }
                check<T>("add", sum, TOLERANCE<T>, [&](T* to) {
                    over(vectors, KERNEL(add), x.data(), x_bias.data(), x_bias.stride(), both ? y.data() : nullptr,
                         y_bias.data(), y_bias.stride(), to, C, pixels * C, vectors);
                });
            }
    std::printf("\n");
}

template <class T> void joins(int B, int pixels, int C1, int C2) {
    if (C1 % Vec<T>::N || C2 % Vec<T>::N) return;
    std::printf("%s B %d pixels %2d C %2d and %2d:", of_type<T>("f32 ", "bf16"), B, pixels, C1, C2);
    const int rows = B * pixels, C = C1 + C2;
    const size_t vectors = (size_t)rows * C / Vec<T>::N;
    Array<T> x = normal<T>(rows * C1), y = normal<T>(rows * C2), z = normal<T>(rows * C);
    for (int x_rows : {0, 1, B})
        for (int y_rows : {0, 1, B}) {
            Bias x_bias(x_rows, C1), y_bias(y_rows, C2);
            Doubles joined(rows * C);
            for (int r = 0; r < rows; r++)
                for (int c = 0; c < C; c++)
                    joined[r * C + c] = c < C1 ? (double)x[r * C1 + c] + x_bias.of(r / pixels, c)
                                               : (double)y[r * C2 + c - C1] + y_bias.of(r / pixels, c - C1);
            check<T>("concat", joined, TOLERANCE<T>, [&](T* to) {
                over(vectors, KERNEL(concat), x.data(), x_bias.data(), x_bias.stride(), y.data(), y_bias.data(),
                     y_bias.stride(), to, C1, C2, pixels, vectors);
            });
        }
    Doubles left, right;
    for (int i = 0; i < rows * C; i++) (i % C < C1 ? left : right).push_back(z[i]);
    Array<T> other_left(left.size()), other_right(right.size());
    check<T>("split, left", left, TOLERANCE<T>, [&](T* to) {
        over(vectors, KERNEL(split), z.data(), to, other_right.data(), C1, C2, vectors);
    });
    check<T>("right", right, TOLERANCE<T>, [&](T* to) {
        over(vectors, KERNEL(split), z.data(), other_left.data(), to, C1, C2, vectors);
    });
    std::printf("\n");
}

template <class T> void doublings(int B, int h, int w, int C) {
    if (C % Vec<T>::N) return;
    std::printf("%s B %d h %d w %d C %2d:", of_type<T>("f32 ", "bf16"), B, h, w, C);
    const size_t small = (size_t)B * h * w * C, vectors = small / Vec<T>::N;
    Array<T> x = normal<T>(small), dy = normal<T>(4 * small);
    Doubles dx(small);
    // Calls f(place in the large map, place in the small one, picture, channel) for all values of the large one.
    auto each = [&](auto f) {
        for (int n = 0; n < B; n++)
            for (int i = 0; i < 2 * h; i++)
                for (int j = 0; j < 2 * w; j++)
                    for (int c = 0; c < C; c++)
                        f(((n * 2 * h + i) * 2 * w + j) * C + c, ((n * h + i / 2) * w + j / 2) * C + c, n, c);
    };
    for (int rows : {0, 1, B}) {
        Bias bias(rows, C);
        Doubles y(4 * small);
        each([&](int to, int from, int n, int c) { y[to] = (double)x[from] + bias.of(n, c); });
        check<T>("upsample", y, TOLERANCE<T>, [&](T* to) {
            over(4 * vectors, KERNEL(upsample), x.data(), bias.data(), bias.stride(), to, h, w, C, 4 * vectors);
        });
    }
    each([&](int from, int to, int, int) { dx[to] += (double)dy[from]; });
    check<T>("upsample_backward", dx, TOLERANCE<T>,
             [&](T* to) { over(vectors, KERNEL(upsample_backward), dy.data(), to, h, w, C, vectors); });
    std::printf("\n");
}

// Launched as by row_sums in ops/nhwc/cuda.rs.
template <class T> void sums(int G, int rows, int C) {
    constexpr int N = Vec<T>::N;
    auto divide = [](int x, int y) { return (x + y - 1) / y; };
    const int runs = std::min<int>(std::bit_ceil((unsigned)(C / N)), 32), tiles = divide(C, runs * N);
    const int parts = std::min(divide(rows, 8 * 256 / runs), std::max(1056 / (tiles * G), 1));
    std::printf("%s G %d rows %5d C %3d (%d runs, %d tiles, %d parts):", of_type<T>("f32 ", "bf16"), G, rows, C, runs,
                tiles, parts);
    Array<T> x = normal<T>((size_t)G * rows * C);
    Doubles total((size_t)G * C);
    for (size_t i = 0; i < x.size(); i++) total[i / C / rows * C + i % C] += (double)x[i];
    check<float>("sums", total, 1e-4, [&](float* to) {
        Array<float> several((size_t)G * parts * C);
        float* partial = parts > 1 ? several.data() : to;
        launch(KERNEL(sums_of_parts), dim3(tiles, parts, G), 256, 0, x.data(), partial, rows, C, runs,
               divide(rows, parts));
        if (parts > 1) launch(sum_of_parts, dim3(divide(C, 32), 1, G), 256, 0, partial, to, parts, C);
    });
    std::printf("\n");
}

template <class T> void test() {
    const int of_layouts[][4] = {{2, 3, 20, 8}, {3, 16, 16, 16}, {2, 7, 15, 8}, {3, 20, 9, 24}, {1, 1, 1, 8},
                                 {5, 7, 63, 24}};
    for (const auto& [B, c, pixels, padded] : of_layouts) layouts<T>(B, c, pixels, padded);
    const int of_weights[][5] = {{5, 3, 9, 8, 8}, {7, 20, 9, 8, 24}, {20, 7, 1, 24, 8}, {16, 16, 9, 16, 16},
                                 {1, 1, 1, 8, 8}};
    for (const auto& [o, c, taps, padded_o, padded_c] : of_weights) weights<T>(o, c, taps, padded_o, padded_c);
    const int of_additions[][3] = {{3, 24, 16}, {2, 15, 24}, {1, 1, 8}, {5, 7, 40}, {3, 35, 20}};
    for (const auto& [B, pixels, C] : of_additions) additions<T>(B, pixels, C);
    const int of_joins[][4] = {{3, 24, 16, 24}, {2, 15, 8, 8}, {1, 1, 40, 16}, {5, 7, 8, 72}, {3, 7, 20, 12}};
    for (const auto& [B, pixels, C1, C2] : of_joins) joins<T>(B, pixels, C1, C2);
    const int of_doublings[][4] = {{3, 4, 6, 16}, {2, 3, 5, 24}, {1, 1, 1, 8}, {3, 7, 1, 40}, {2, 1, 9, 12}};
    for (const auto& [B, h, w, C] : of_doublings) doublings<T>(B, h, w, C);
    // Of the last one, in f32, no rows are left for the last part.
    const int of_sums[][3] = {{1, 1000, 16}, {3, 24, 16}, {2, 1, 512}, {1, 5000, 128}, {3, 256, 384},
                              {2, 77, 24},   {1, 68540, 128}};
    for (const auto& [G, rows, C] : of_sums) sums<T>(G, rows, C);
}

int main() {
    test<float>();
    test<bf16>();
    std::printf("%d passed, %d failed\n", passed, failed);
    return failed > 0;
}
