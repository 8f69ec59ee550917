// Pictures of every class, made by two threads on one generator, from a file in memory: generate MODEL.onnx
//
//   cargo build --release -p dmd-capi
//   c++ -std=c++17 generate.cpp -I ../include -L ../../../target/release -ldmd_capi -pthread -o generate
#include "dmd.h"

#include <cstdio>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

static void check(dmd_status status) {
    if (status != DMD_STATUS_OK) throw std::runtime_error(dmd_last_error());
}

// Owns a handle. The calls that use it may be on any threads.
class Generator {
public:
    Generator(const std::vector<uint8_t> &bytes, const dmd_options &options) {
        check(dmd_open_bytes(bytes.data(), bytes.size(), &options, &handle));
    }
    ~Generator() { dmd_close(handle); }
    Generator(const Generator &) = delete;
    Generator &operator=(const Generator &) = delete;

    dmd_info info() const {
        dmd_info info{};
        info.size = sizeof info;
        check(dmd_describe(handle, &info));
        return info;
    }

    std::string class_name(int64_t label) const {
        size_t needed = 0;
        check(dmd_class_name(handle, label, nullptr, 0, &needed));
        std::string name(needed, '\0');
        check(dmd_class_name(handle, label, name.data(), name.size(), &needed));
        name.pop_back();
        return name;
    }

    // f32 (labels.size(), channels, height, width) in [-1, 1].
    std::vector<float> generate(uint64_t seed, const std::vector<int64_t> &labels) const {
        const dmd_info about = info();
        std::vector<float> values(labels.size() * about.channels * about.height * about.width);
        dmd_request request{};
        request.size = sizeof request;
        request.seed = seed;
        request.batch = labels.size();
        request.labels = labels.data();
        request.n_labels = labels.size();
        check(dmd_generate_f32(handle, &request, values.data(), values.size()));
        return values;
    }

private:
    dmd_generator handle = 0;
};

int main(int argc, char **argv) try {
    if (argc != 2) throw std::runtime_error("usage: generate MODEL.onnx");
    if (dmd_abi_version() != DMD_ABI_VERSION) throw std::runtime_error("the library is of another version");
    std::ifstream file(argv[1], std::ios::binary);
    const std::vector<uint8_t> bytes(std::istreambuf_iterator<char>(file), {});

    dmd_options options{};
    options.size = sizeof options;
    options.threads = 1;
    const Generator generator(bytes, options);
    std::vector<int64_t> labels(generator.info().n_classes);
    for (size_t i = 0; i < labels.size(); i++) labels[i] = static_cast<int64_t>(i);

    std::vector<float> first, second;
    std::thread other([&] { second = generator.generate(7, labels); });
    first = generator.generate(7, labels);
    other.join();
    if (first != second) throw std::runtime_error("two threads made different pictures of one seed");
    for (size_t i = 0; i < labels.size(); i++) {
        const size_t of_each = first.size() / labels.size();
        std::printf("%s %.6f\n", generator.class_name(labels[i]).c_str(), static_cast<double>(first[i * of_each]));
    }
    return 0;
} catch (const std::exception &error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
}
