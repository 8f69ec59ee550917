// Compares philox.cu, run by the emulator, with the known answers of Random123 and with numbers of the runtime's Stream.
//
//     g++ -std=c++20 -O1 -fno-strict-aliasing philox_test.cpp -o /tmp/philox_test && /tmp/philox_test
#define DMD_EMULATOR
#include "cuda_emulator.h"

#include "../../src/ops/gpu/kernels/philox.cu"

using dmd_emulator::Array;

static int passed = 0, failed = 0;

static void check(const std::string& what, bool holds) {
    (holds ? passed : failed)++;
    if (!holds) std::printf("FAILED: %s\n", what.c_str());
}

// The lines `philox4x32 10` of `kat_vectors` in Random123.
static void test_words() {
    struct Case { Words counter; uint32_t key[2]; Words expected; };
    const Case cases[] = {
        {{{0, 0, 0, 0}}, {0, 0}, {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}}},
        {{{~0u, ~0u, ~0u, ~0u}}, {~0u, ~0u}, {{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}}},
        {{{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}}, {0xa4093822, 0x299f31d0},
         {{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}}},
    };
    for (const Case& c : cases) {
        const Words found = philox4x32_10(c.counter, c.key[0], c.key[1]);
        check("a known answer", std::equal(found.w, found.w + 4, c.expected.w));
    }
}

static Array<float> normals(size_t n, uint64_t seed, uint32_t purpose, uint64_t index) {
    Array<float> out(n);
    const unsigned threads = 256, blocks = ((n + 1) / 2 + threads - 1) / threads;
    launch(philox_normal, dim3(blocks), dim3(threads), 0, out.data(), n, seed, purpose, index);
    return out;
}

// The first numbers of dmd_runtime::noise::Stream::new(seed, purpose, index).normal(n), printed by Rust; the same are in
// gpu_optimizer.rs.
static void test_normals() {
    struct Case { uint64_t seed; uint32_t purpose; uint64_t index; float expected[8]; };
    const Case cases[] = {
        {7, 16, 3,
         {0.70117307f, -1.861006f, -1.4832946f, -0.9362328f, -0.24483064f, -1.9306521f, -0.34302774f, -0.35389462f}},
        {0x123456789abcdef0, 21, 0x500000004,
         {0.44655395f, 0.5653965f, 0.5609394f, -0.61000663f, 0.7587914f, -0.5584143f, -1.073773f, -0.8499863f}},
    };
    for (const Case& c : cases)
        for (size_t n : {1, 7, 8}) {
            Array<float> found = normals(n, c.seed, c.purpose, c.index);
            for (size_t i = 0; i < n; i++) check("number " + std::to_string(i), found[i] == c.expected[i]);
        }
    // Of several blocks of threads, every number is written.
    Array<float> many = normals(1235, 1, 2, 3);
    check("many", std::all_of(many.begin(), many.end(), [](float v) { return std::fabs(v) < 6; }));
}

int main() {
    test_words();
    test_normals();
    std::printf("%d passed, %d failed\n", passed, failed);
    return failed > 0;
}
