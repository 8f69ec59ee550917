// Compares the kernels of attention.cu, run by the emulator, with attention and its gradients in f64.
//
//     g++ -std=c++20 -O1 -fno-strict-aliasing attention_test.cpp -o /tmp/attention_test && /tmp/attention_test
#define DMD_EMULATOR
#include "cuda_emulator.h"

#include "../../src/ops/gpu/kernels/attention.cu"

#include <random>

using dmd_emulator::Array;
using Doubles = std::vector<double>;

struct Shape {
    int B, heads, T, d;
    float bias;   // the biases' spread, 0 for none. Those of the keys cancel out of dq, but not out of its error, which
                  // is that of delta, from an o rounded to bf16.
    float spread; // of the queries; large ones make sharp weights
    bool low;     // All scores are about −125: keys beyond T, whose scores are 0, must not count.
    int C() const { return heads * d; }
};

static int passed = 0, failed = 0;
static std::mt19937 rng(7);

// As the multiplier sees it.
static float rounded(float x, bf16) { return float(bf16(x)); }
static float rounded(float x, float) { return __uint_as_float(tf32(x)); }

template <class T> Array<T> normal(size_t count, float spread) {
    Array<T> x(count);
    std::normal_distribution<float> of(0, spread);
    for (T& v : x) v = T(rounded(of(rng), T()));
    return x;
}

// ‖x − reference‖ / ‖reference‖, the latter at least that of values of 0.01: the gradients of a single pixel's weight
// are 0. NaN where anything is NaN.
template <class X> double distance(X& x, const Doubles& reference) {
    double error = 0, norm = 0;
    for (size_t i = 0; i < reference.size(); i++) {
        const double r = reference[i], e = (double)x[i] - r;
        error += e * e, norm += r * r;
    }
    return std::sqrt(error / std::max(norm, 1e-4 * reference.size()));
}

template <class X> void check(const char* name, X& x, const Doubles& reference, double most) {
    const double error = distance(x, reference);
    std::printf(" %s %.1e", name, error);
    if (error < most) {
        passed++;
    } else {
        failed++;
        std::printf(" (MORE THAN %.0e)", most);
    }
}

// What they should write.
struct Reference {
    Doubles o, lse, dq, dk, dv;
};

static Reference reference(const Shape& s, const Doubles& q, const Doubles& k, const Doubles& v, const Doubles& dy) {
    const int T = s.T, d = s.d, C = s.C();
    const double scale = 1 / std::sqrt((double)d);
    const Doubles zeros(q.size());
    Reference r{zeros, Doubles((size_t)s.B * s.heads * T), zeros, zeros, zeros};
    for (int b = 0; b < s.B; b++)
        for (int h = 0; h < s.heads; h++)
            for (int i = 0; i < T; i++) {
                auto at = [&](int pixel) { return ((size_t)b * T + pixel) * C + h * d; };
                Doubles p(T), dp(T);
                double sum = 0, along = 0;
                for (int j = 0; j < T; j++) {
                    for (int c = 0; c < d; c++) p[j] += q[at(i) + c] * k[at(j) + c] * scale;
                    for (int c = 0; c < d; c++) dp[j] += dy[at(i) + c] * v[at(j) + c];
                }
                const double most = *std::max_element(p.begin(), p.end());
                for (double& x : p) sum += x = std::exp(x - most);
                r.lse[((size_t)b * s.heads + h) * T + i] = most + std::log(sum);
                for (int j = 0; j < T; j++) along += (p[j] /= sum) * dp[j];
                for (int j = 0; j < T; j++)
                    for (int c = 0; c < d; c++) {
                        const double ds = p[j] * (dp[j] - along) * scale;
                        r.o[at(i) + c] += p[j] * v[at(j) + c];
                        r.dv[at(j) + c] += p[j] * dy[at(i) + c];
                        r.dq[at(i) + c] += ds * k[at(j) + c];
                        r.dk[at(j) + c] += ds * q[at(i) + c];
                    }
            }
    return r;
}

// What the kernels wrote.
template <class T> struct Results {
    Array<T> o, dq, dk, dv;
    Array<float> lse, delta;
    Results(size_t values, size_t rows) : o(values), dq(values), dk(values), dv(values), lse(rows), delta(rows) {}
    bool operator==(Results& other) {
        auto same = [](auto& x, auto& y) { return std::memcmp(x.data(), y.data(), x.size() * sizeof x[0]) == 0; };
        return same(o, other.o) && same(dq, other.dq) && same(dk, other.dk) && same(dv, other.dv) &&
               same(lse, other.lse) && same(delta, other.delta);
    }
};

#define RUN(NAME, DELTA)                                                                                           \
    launch(attention_forward_##NAME, grid, 128, 0, q, k, v, qb, kb, vb, to.o.data(), to.lse.data(), s.heads, s.T,  \
           s.d, scale);                                                                                            \
    launch(DELTA, grid, 128, 0, to.o.data(), dy, to.delta.data(), s.heads, s.T, s.d);                              \
    launch(attention_backward_kv_##NAME, grid, 128, 0, q, k, v, qb, kb, vb, dy, to.lse.data(), to.delta.data(),    \
           to.dk.data(), to.dv.data(), s.heads, s.T, s.d, scale);                                                  \
    launch(attention_backward_q_##NAME, grid, 128, 0, q, k, v, qb, kb, vb, dy, to.lse.data(), to.delta.data(),     \
           to.dq.data(), s.heads, s.T, s.d, scale)

template <class T>
static void run(const Shape& s, const T* q, const T* k, const T* v, const float* qb, const float* kb, const float* vb,
                const T* dy, Results<T>& to) {
    const dim3 grid((s.T + 63) / 64, s.B * s.heads);
    const float scale = 1 / std::sqrt((float)s.d);
    if constexpr (sizeof(T) == 4) {
        if (s.d <= 16) {
            RUN(f32_16, attention_delta_f32);
        } else if (s.d <= 32) {
            RUN(f32_32, attention_delta_f32);
        } else {
            RUN(f32_64, attention_delta_f32);
        }
    } else if (s.d <= 16) {
        RUN(16, attention_delta);
    } else if (s.d <= 32) {
        RUN(32, attention_delta);
    } else if (s.d <= 64) {
        RUN(64, attention_delta);
    } else {
        RUN(128, attention_delta);
    }
}

template <class E> static void test(const Shape& s) {
    const size_t values = (size_t)s.B * s.T * s.C(), rows = (size_t)s.B * s.heads * s.T;
    Array<E> q = normal<E>(values, s.spread), k = normal<E>(values, 1), v = normal<E>(values, 1), dy = normal<E>(values, 1);
    for (size_t i = 0; s.low && i < values; i += s.d) q[i] = 1000, k[i] = -std::sqrt(s.d) / 8;
    Array<float> biases[3] = {Array<float>(s.C()), Array<float>(s.C()), Array<float>(s.C())};
    std::normal_distribution<float> of(0, s.bias > 0 ? s.bias : 1);
    for (auto& bias : biases)
        for (float& x : bias) x = of(rng);

    auto whole = [&](Array<E>& x, Array<float>* bias) {
        Doubles sums(values);
        for (size_t i = 0; i < values; i++)
            sums[i] = bias == nullptr ? float(x[i]) : rounded(float(x[i]) + (*bias)[i % s.C()], E());
        return sums;
    };
    auto bias = [&](int i) { return s.bias > 0 ? &biases[i] : nullptr; };
    const Reference r = reference(s, whole(q, bias(0)), whole(k, bias(1)), whole(v, bias(2)), whole(dy, nullptr));

    Results<E> to(values, rows), again(values, rows);
    for (Results<E>* results : {&to, &again}) {
        auto row = [&](int i) { return s.bias > 0 ? biases[i].data() : nullptr; };
        dmd_emulator::backwards = results == &again;
        run(s, q.data(), k.data(), v.data(), row(0), row(1), row(2), dy.data(), *results);
    }
    // Of what the kernel was given, not of the exact o.
    Doubles delta(rows);
    for (size_t i = 0; i < rows; i++) {
        const size_t head = i / s.T, pixel = i % s.T;
        for (int c = 0; c < s.d; c++) {
            const size_t at = (head / s.heads * s.T + pixel) * s.C() + head % s.heads * s.d + c;
            delta[i] += (double)float(to.o[at]) * float(dy[at]);
        }
    }
    std::printf("%s B %d heads %d T %3d d %3d bias %.1f spread %2.0f:", sizeof(E) == 4 ? "f32 " : "bf16", s.B, s.heads, s.T, s.d, s.bias, s.spread);
    // TF32 has three bits more than bf16; sharp weights multiply what is lost in the scores.
    const double most = sizeof(E) == 4 && s.spread <= 1 ? 3e-3 : 1e-2;
    check("o", to.o, r.o, most);
    check("lse", to.lse, r.lse, 1e-3);
    check("delta", to.delta, delta, 1e-3);
    check("dq", to.dq, r.dq, most);
    check("dk", to.dk, r.dk, most);
    check("dv", to.dv, r.dv, most);
    const bool same = to == again;
    (same ? passed : failed)++;
    std::printf("%s\n", same ? "" : " (DEPENDS ON THE ORDER OF THREADS)");
}

static void both(const Shape& s) {
    test<bf16>(s);
    if (s.d <= 64) test<float>(s); // There are no f32 kernels for wider heads.
}

int main() {
    // One pixel, whole and broken tiles, every padded width with and without padding, keys beyond two tiles.
    const int shapes[][4] = {{1, 2, 1, 8},    {1, 2, 16, 8},  {1, 1, 70, 16}, {2, 2, 64, 32},
                             {2, 3, 33, 24},  {1, 3, 150, 32}, {1, 2, 100, 64}, {2, 1, 65, 40},
                             {1, 2, 16, 64},  {1, 1, 130, 128}, {1, 2, 63, 72}, {3, 5, 16, 16}};
    for (auto [B, heads, T, d] : shapes)
        for (float bias : {0.0f, 0.5f}) both({B, heads, T, d, bias, 1, false});
    both({1, 1, 200, 32, 0.2f, 20, false});
    both({1, 1, 90, 128, 0, 20, false});
    both({1, 2, 100, 64, 0, 1, true});
    both({1, 1, 40, 16, 0, 1, true});
    std::printf("%d passed, %d failed\n", passed, failed);
    return failed > 0;
}
