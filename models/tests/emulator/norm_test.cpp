// Compares the kernels of norm.cu, run by the emulator, with group norm and its gradients in f64.
//
//     g++ -std=c++20 -O1 -fno-strict-aliasing norm_test.cpp -o /tmp/norm_test && /tmp/norm_test
#define DMD_EMULATOR
#include "cuda_emulator.h"

#include "../../src/ops/gpu/kernels/norm.cu"

#include <optional>
#include <random>

using dmd_emulator::Array;
using Doubles = std::vector<double>;

struct Shape { int B, pixels, C, groups; };

constexpr float EPS = 1e-5;
static int passed = 0, failed = 0;
static std::mt19937 rng(7);

template <class T> Array<T> normal(size_t count, float mean, float spread) {
    Array<T> x(count);
    std::normal_distribution<float> of(mean, spread);
    for (T& v : x) v = T(of(rng));
    return x;
}

// The larger of ‖x − reference‖ / ‖reference‖ and that of a single value, to its reference plus the root of the mean
// square of all; `scale` is the least that this root may be. Infinite where anything is NaN.
template <class X> double distance(const X* x, const Doubles& reference, double scale) {
    double error = 0, norm = 0, worst = 0;
    for (double r : reference) norm += r * r;
    const double rms = std::max(std::sqrt(norm / reference.size()), scale);
    for (size_t i = 0; i < reference.size(); i++) {
        const double e = std::abs((double)x[i] - reference[i]);
        if (std::isnan(e)) return INFINITY;
        error += e * e, worst = std::max(worst, e / (std::abs(reference[i]) + rms));
    }
    return std::max(std::sqrt(error / reference.size()) / rms, worst);
}

template <class X> void check(const char* name, const X* x, const Doubles& reference, double most, double scale = 0) {
    const double error = distance(x, reference, scale);
    std::printf(" %s %.1e", name, error);
    if (error <= most) {
        passed++;
    } else {
        failed++;
        std::printf(" (MORE THAN %.0e)", most);
    }
}

// How the host shares a map among blocks: Slabs::new in ops/nhwc/cuda.rs.
struct Slabs { int slab, runs, threads; dim3 grid; };

template <class T> std::optional<Slabs> slabs(const Shape& s) {
    const int run = 16 / sizeof(T), per_group = s.C / s.groups, most = std::min(256, 32 * run);
    if (s.C % run) return {};
    int slab = per_group;
    while (slab <= most && slab % run) slab += per_group;
    if (slab > most) return {};
    auto across = [&](int slab) { return (s.C + slab - 1) / slab; };
    auto blocks = [&](int slab) { return s.B * across(slab); };
    while (2 * slab <= std::min(most, s.C) && (slab * (int)sizeof(T) < 128 || slab * s.pixels < 8192) &&
           blocks(2 * slab) >= std::min(264, blocks(slab)))
        slab *= 2;
    const int runs = std::bit_ceil((unsigned)(slab / run));
    const int lanes = std::clamp<int>(std::bit_ceil((unsigned)s.pixels), std::max(32 / runs, 1), MAX_THREADS / runs);
    return Slabs{slab, runs, runs * lanes, dim3(across(slab), s.B)};
}

// What they should write; totals by plane.
struct Reference { Doubles y, stats, dx, totals[3]; };

static Reference reference(const Shape& s, bool silu, const Doubles& x, float* weight, float* beta, const Doubles& dy) {
    const int per_group = s.C / s.groups;
    const double count = (double)per_group * s.pixels;
    const Doubles values(x.size()), channels((size_t)s.B * s.C);
    Reference r{values, {}, values, {channels, channels, channels}};
    Doubles dz = values;
    for (int n = 0; n < s.B; n++)
        for (int g = 0; g < s.groups; g++) {
            // Calls f(place in the map, channel) for all values of the group.
            auto each = [&](auto f) {
                for (size_t p = (size_t)n * s.pixels; p < (size_t)(n + 1) * s.pixels; p++)
                    for (int c = g * per_group; c < (g + 1) * per_group; c++) f(p * s.C + c, c);
            };
            double mean = 0, variance = 0, along = 0, sum = 0;
            each([&](size_t i, int) { mean += x[i] / count; });
            each([&](size_t i, int) { variance += (x[i] - mean) * (x[i] - mean) / count; });
            const double rstd = 1 / std::sqrt(variance + EPS);
            r.stats.push_back(mean), r.stats.push_back(rstd);
            each([&](size_t i, int c) {
                const double normal = (x[i] - mean) * rstd, z = normal * weight[c] + beta[c];
                const double e = 1 / (1 + std::exp(-z));
                r.y[i] = silu ? z * e : z;
                dz[i] = silu ? dy[i] * (e + z * e * (1 - e)) : dy[i];
                r.totals[0][n * s.C + c] += dz[i] * normal, r.totals[1][n * s.C + c] += dz[i];
                along += dz[i] * weight[c] * normal / count, sum += dz[i] * weight[c] / count;
            });
            each([&](size_t i, int c) {
                r.dx[i] = rstd * (dz[i] * weight[c] - sum - (x[i] - mean) * rstd * along);
                r.totals[2][n * s.C + c] += r.dx[i];
            });
        }
    return r;
}

// What the kernels wrote: the gradients of a map that had none before, and of one that had.
template <class T> struct Results {
    Array<T> y, dx, more;
    Array<float> stats, totals, totals_of_more;
    explicit Results(const Shape& s)
        : y((size_t)s.B * s.pixels * s.C), dx(y.size()), more(y.size()), stats(2 * s.B * s.groups),
          totals(3 * s.B * s.C), totals_of_more(totals.size()) {}
    bool operator==(Results& other) {
        auto same = [](auto& x, auto& y) { return std::memcmp(x.data(), y.data(), x.size() * sizeof x[0]) == 0; };
        return same(y, other.y) && same(dx, other.dx) && same(more, other.more) && same(stats, other.stats) &&
               same(totals, other.totals) && same(totals_of_more, other.totals_of_more);
    }
};

template <class T> auto of_type(auto f32, auto bf16) {
    if constexpr (std::is_same_v<T, float>)
        return f32;
    else
        return bf16;
}

// `rows` of the bias: 0 for none.
template <class T> void test(const Shape& s, int rows, bool silu) {
    const std::optional<Slabs> places = slabs<T>(s);
    if (!places) return;
    const auto [slab, runs, threads, grid] = *places;
    const size_t values = (size_t)s.B * s.pixels * s.C;
    Array<T> x = normal<T>(values, 0.3, 1), dy = normal<T>(values, 0.1, 1), existing = normal<T>(values, 0, 1);
    Array<float> weight = normal<float>(s.C, 1, 0.5), beta = normal<float>(s.C, 0, 0.5);
    Array<float> biases = normal<float>((size_t)rows * s.C, 0.2, 1);
    const float* bias = rows ? biases.data() : nullptr;
    const int stride = rows > 1 ? s.C : 0, per_group = s.C / s.groups;

    Doubles whole(values), gradient(dy.begin(), dy.end());
    for (size_t i = 0; i < values; i++)
        whole[i] = (double)x[i] + (bias ? bias[i / s.C / s.pixels * stride + i % s.C] : 0);
    const Reference r = reference(s, silu, whole, weight.data(), beta.data(), gradient);
    Doubles more(values), planes;
    for (size_t i = 0; i < values; i++) more[i] = r.dx[i] + (double)existing[i];
    for (const Doubles& plane : r.totals) planes.insert(planes.end(), plane.begin(), plane.end());

    Results<T> to(s), again(s);
    for (Results<T>* results : {&to, &again}) {
        dmd_emulator::backwards = results == &again;
        launch(of_type<T>(group_norm_forward_f32, group_norm_forward_bf16), grid, threads, 0, x.data(), bias, stride,
               weight.data(), beta.data(), results->y.data(), results->stats.data(), s.pixels, s.C, per_group, slab,
               runs, EPS, silu);
        auto backward = [&](const T* existing, Array<T>& dx, Array<float>& totals) {
            launch(of_type<T>(group_norm_backward_f32, group_norm_backward_bf16), grid, threads, 0, x.data(), bias,
                   stride, weight.data(), beta.data(), results->stats.data(), dy.data(), existing, dx.data(),
                   totals.data(), s.pixels, s.C, per_group, slab, runs, silu);
        };
        backward(nullptr, results->dx, results->totals);
        backward(existing.data(), results->more, results->totals_of_more);
    }
    std::printf("%s B %3d pixels %3d C %3d groups %2d bias %3d silu %d (slab %3d of %2d runs, %3d threads):",
                of_type<T>("f32 ", "bf16"), s.B, s.pixels, s.C, s.groups, rows, silu, slab, runs, threads);
    const double most = of_type<T>(1e-5, 1e-2);
    check("y", to.y.data(), r.y, most);
    check("stats", to.stats.data(), r.stats, 1e-5);
    check("dx", to.dx.data(), r.dx, most);
    check("dx + existing", to.more.data(), more, most);
    // dx sums to 0 over a group, but for rounding; so its sums over pixels are compared with those of random signs.
    double squares = 0;
    for (double v : r.dx) squares += v * v;
    const size_t plane = (size_t)s.B * s.C;
    for (Array<float>* totals : {&to.totals, &to.totals_of_more}) {
        check("of weight", totals->data(), r.totals[0], 1e-4);
        check("of beta", totals->data() + plane, r.totals[1], 1e-4);
        if (rows) check("of bias", totals->data() + 2 * plane, r.totals[2], 1e-4, std::sqrt(squares / plane));
    }
    const bool same = to == again;
    (same ? passed : failed)++;
    std::printf("%s\n", same ? "" : " (DEPENDS ON THE ORDER OF THREADS)");
}

int main() {
    // Groups of 1 to 256 channels, in runs or across them; more pixels than lanes and fewer. Of many pictures, slabs
    // that are several times as wide as need be, the last one narrower.
    const Shape shapes[] = {{2, 16, 32, 4},   {3, 15, 64, 32},  {2, 64, 128, 32}, {2, 256, 384, 32}, {1, 1, 16, 2},
                            {5, 4, 256, 8},   {2, 9, 24, 1},    {2, 64, 8, 8},    {2, 16, 512, 32},  {2, 9, 192, 32},
                            {2, 3, 256, 1},   {2, 150, 256, 2}, {264, 4, 256, 8}, {132, 3, 40, 5},   {132, 4, 72, 6},
                            {1, 10, 20, 5}};
    for (const Shape& s : shapes)
        for (int rows : {0, 1, s.B})
            for (bool silu : {false, true}) {
                if (rows == 1 && s.B == 1) continue; // The next one is the same.
                test<float>(s, rows, silu);
                test<bf16>(s, rows, silu);
            }
    std::printf("%d passed, %d failed\n", passed, failed);
    return failed > 0;
}
