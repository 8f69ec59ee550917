// Compares the kernels of optimizer.cu, run by the emulator, with the norm, AdamW and the average in f64.
//
//     g++ -std=c++20 -O1 -fno-strict-aliasing optimizer_test.cpp -o /tmp/optimizer_test && /tmp/optimizer_test
#define DMD_EMULATOR
#include "cuda_emulator.h"

#include "../../src/ops/gpu/kernels/optimizer.cu"

#include <random>

using dmd_emulator::Array;

static int passed = 0, failed = 0;
static std::mt19937 rng(7);

static void check(const std::string& what, bool holds) {
    (holds ? passed : failed)++;
    if (!holds) std::printf("FAILED: %s\n", what.c_str());
}

// A tensor with `offset` values before it that are none of its own, so that it may lie where four do not fit.
struct Tensor {
    size_t offset;
    Array<float> values;
    Tensor(size_t len, size_t offset, float spread) : offset(offset), values(offset + len) {
        std::normal_distribution<float> of(0, spread);
        for (float& v : values) v = of(rng);
    }
    float* data() { return values.data() + offset; }
    size_t size() const { return values.size() - offset; }
    std::vector<float> copy() { return {data(), data() + size()}; }
};

// A network of variables of these lengths, of which every second has a gradient that is not aligned.
struct Network {
    std::vector<Tensor> weights, moments, grads, averages;
    std::vector<int64_t> of_adamw, of_average;
    int chunks = 0;

    explicit Network(const std::vector<size_t>& lengths) {
        for (size_t len : lengths) {
            weights.emplace_back(len, 0, 1.0f);
            moments.emplace_back(2 * len, 0, 0.1f);
            for (size_t i = len; i < 2 * len; i++) moments.back().data()[i] = std::fabs(moments.back().data()[i]);
            grads.emplace_back(len, grads.size() % 2, 1.0f);
            averages.emplace_back(len, 0, 1.0f);
        }
        for (size_t i = 0; i < lengths.size(); i++) {
            add(of_adamw, lengths[i], {weights[i].data(), moments[i].data(), grads[i].data()});
            add(of_average, lengths[i], {averages[i].data(), weights[i].data(), nullptr});
            chunks += (lengths[i] + CHUNK - 1) / CHUNK;
        }
    }
    int n() const { return (int)weights.size(); }
    const Row* rows(const std::vector<int64_t>& table) const { return (const Row*)table.data(); }

private:
    void add(std::vector<int64_t>& table, size_t len, std::vector<float*> tensors) const {
        table.insert(table.end(), {chunks, (int64_t)len});
        for (float* tensor : tensors) table.push_back((int64_t)tensor);
    }
};

constexpr float B1 = 0.9f, B2 = 0.99f, RATE = 0.01f, ROOT_SCALE = 1.5f, KEEP = 0.999f, EPS = 1e-6f, SHARE = 0.125f;

static float norm_of(Network& network, float guard) {
    Array<float> partial(network.chunks), scalar(1), norm(1);
    scalar[0] = guard;
    launch(gradient_squares, dim3(network.chunks), dim3(THREADS), 0, network.rows(network.of_adamw), network.n(),
           partial.data());
    launch(gradient_norm, dim3(1), dim3(THREADS_OF_NORM), 0, partial.data(), network.chunks, scalar.data(), norm.data());
    return norm[0];
}

static void update(Network& network, float norm_value, float clip) {
    Array<float> norm(1);
    norm[0] = norm_value;
    launch(adamw, dim3(network.chunks), dim3(THREADS), 0, network.rows(network.of_adamw), network.n(), norm.data(), clip,
           B1, B2, 1 - B1, 1 - B2, RATE, ROOT_SCALE, KEEP, EPS);
    launch(average, dim3(network.chunks), dim3(THREADS), 0, network.rows(network.of_average), network.n(), norm.data(),
           SHARE);
}

static bool near(float found, double expected) {
    return std::fabs(found - expected) <= 2e-6 * (1 + std::fabs(expected));
}

// The norm, and one update from it.
static void test(const std::vector<size_t>& lengths, float clip) {
    Network network(lengths);
    double squares = 0;
    for (Tensor& grad : network.grads)
        for (float g : grad.copy()) squares += (double)g * g;
    const float norm = norm_of(network, 3.0f);
    check("the norm", near(norm, std::sqrt(squares)));
    dmd_emulator::backwards = true;
    check("the norm in another order of threads", norm_of(network, 3.0f) == norm);
    dmd_emulator::backwards = false;

    std::vector<std::vector<float>> weights, moments, averages;
    for (int i = 0; i < network.n(); i++) {
        weights.push_back(network.weights[i].copy());
        moments.push_back(network.moments[i].copy());
        averages.push_back(network.averages[i].copy());
    }
    update(network, norm, clip);
    const double scale = norm > clip ? clip / std::sqrt(squares) : 1;
    for (int t = 0; t < network.n(); t++) {
        const size_t len = lengths[t];
        bool moments_hold = true, weights_hold = true, averages_hold = true;
        for (size_t i = 0; i < len; i++) {
            const double g = network.grads[t].data()[i] * scale;
            const double m = moments[t][i] * (double)B1 + g * (1 - B1);
            const double v = moments[t][len + i] * (double)B2 + g * g * (1 - B2);
            const double p = weights[t][i] * (double)KEEP - m * RATE / (std::sqrt(v) * ROOT_SCALE + EPS);
            const double a = averages[t][i] + (p - averages[t][i]) * SHARE;
            moments_hold &= near(network.moments[t].data()[i], m) && near(network.moments[t].data()[len + i], v);
            weights_hold &= near(network.weights[t].data()[i], p);
            averages_hold &= near(network.averages[t].data()[i], a);
        }
        const std::string of = " of tensor " + std::to_string(t) + " of length " + std::to_string(len);
        check("moments" + of, moments_hold);
        check("weights" + of, weights_hold);
        check("averages" + of, averages_hold);
    }
}

static void test_not_finite() {
    constexpr float NOT = std::numeric_limits<float>::quiet_NaN(), MUCH = std::numeric_limits<float>::infinity();
    Network network({5, 9000, 4});
    for (float guard : {NOT, MUCH, -MUCH}) check("a guard that is not finite", !std::isfinite(norm_of(network, guard)));
    for (float bad : {NOT, MUCH, 1e30f}) {
        float& g = network.grads[1].data()[8999];
        const float good = g;
        g = bad;
        check("a gradient that is not finite", !std::isfinite(norm_of(network, 1)));
        g = good;
    }
    std::vector<std::vector<float>> before, after;
    auto copy = [&](std::vector<std::vector<float>>& to) {
        for (auto* tensors : {&network.weights, &network.moments, &network.averages})
            for (Tensor& tensor : *tensors) to.push_back(tensor.copy());
    };
    copy(before);
    update(network, NOT, 1);
    update(network, MUCH, 1);
    copy(after);
    check("nothing changes without a finite norm", before == after);
}

int main() {
    const float never = std::numeric_limits<float>::infinity();
    test({1}, never);
    test({0, 3, 0, 0, 4, 7, 0}, never);
    test({8192, 8191, 8193, 16384, 5, 40001}, never);
    test({8192, 8191, 8193, 16384, 5, 40001}, 1);
    test(std::vector<size_t>(350, 130), 10);
    test({1, 3000003}, 10);
    test_not_finite();
    std::printf("%d passed, %d failed\n", passed, failed);
    return failed > 0;
}
