// Loads a TensorRT plan, runs it on golden inputs, and compares with golden outputs. TensorRT 10.13 or newer.
//
//     check_golden model.plan images:input_0.bin logits:output_0.bin
//
// Each tensor is named with a file of raw values, as `repvgg-deploy package --triton` writes them beside a model. Whether it
// is an input is for the plan to say. Exit status: 0 all outputs agree, 1 one does not, 2 something failed.

#include <NvInfer.h>
#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

using Bytes = std::vector<char>;
constexpr double kMaxRelative = 0.02;

struct Logger : nvinfer1::ILogger {
    void log(Severity severity, char const* text) noexcept override {
        if (severity <= Severity::kWARNING) std::cerr << text << '\n';
    }
};

void require(bool condition, std::string const& what) {
    if (!condition) throw std::runtime_error(what);
}

void check(cudaError_t status) { require(status == cudaSuccess, cudaGetErrorString(status)); }

Bytes readFile(std::string const& path) {
    std::ifstream file(path, std::ios::binary);
    require(file.good(), "cannot read " + path);
    return Bytes(std::istreambuf_iterator<char>(file), {});
}

struct Free {
    void operator()(void* data) const { cudaFree(data); }
};
using DeviceBuffer = std::unique_ptr<void, Free>;

DeviceBuffer allocate(std::size_t bytes) {
    void* data = nullptr;
    check(cudaMalloc(&data, bytes));
    return DeviceBuffer(data);
}

std::size_t bytesPerValue(nvinfer1::DataType type) {
    switch (type) {
        case nvinfer1::DataType::kINT64: return 8;
        case nvinfer1::DataType::kFLOAT:
        case nvinfer1::DataType::kINT32: return 4;
        case nvinfer1::DataType::kHALF: return 2;
        case nvinfer1::DataType::kUINT8: return 1;
        default: throw std::runtime_error("a tensor's type is none of float, half, uint8, int32 and int64");
    }
}

double halfToDouble(std::uint16_t bits) {
    int const exponent = (bits >> 10) & 31, mantissa = bits & 1023;
    double const finite = std::ldexp(exponent ? 1024 + mantissa : mantissa, (exponent ? exponent : 1) - 25);
    return (bits & 0x8000 ? -1 : 1) * (exponent < 31 ? finite : mantissa ? NAN : INFINITY);
}

double valueAt(Bytes const& bytes, nvinfer1::DataType type, std::size_t index) {
    auto const read = [&](auto value) {
        std::memcpy(&value, bytes.data() + index * sizeof value, sizeof value);
        return value;
    };
    switch (type) {
        case nvinfer1::DataType::kINT64: return static_cast<double>(read(std::int64_t{}));
        case nvinfer1::DataType::kINT32: return read(std::int32_t{});
        case nvinfer1::DataType::kHALF: return halfToDouble(read(std::uint16_t{}));
        case nvinfer1::DataType::kUINT8: return read(std::uint8_t{});
        default: return read(float{});
    }
}

// |found - expected| / |expected| over the whole tensor; NaN, which no limit is above, stays NaN.
double relativeDifference(Bytes const& expected, Bytes const& found, nvinfer1::DataType type) {
    double difference = 0, size = 0;
    for (std::size_t i = 0; i < expected.size() / bytesPerValue(type); ++i) {
        double const wanted = valueAt(expected, type, i), delta = valueAt(found, type, i) - wanted;
        difference += delta * delta;
        size += wanted * wanted;
    }
    return difference == 0 ? 0 : std::sqrt(difference / size);
}

std::size_t countBytes(nvinfer1::Dims const& shape, nvinfer1::DataType type) {
    std::size_t count = bytesPerValue(type);
    for (int i = 0; i < shape.nbDims; ++i) count *= static_cast<std::size_t>(shape.d[i]);
    return count;
}

bool run(std::string const& path, std::map<std::string, Bytes> const& golden) {
    Logger logger;
    Bytes const plan = readFile(path);
    std::unique_ptr<nvinfer1::IRuntime> runtime{nvinfer1::createInferRuntime(logger)};
    require(runtime != nullptr, "TensorRT cannot be started");
    std::unique_ptr<nvinfer1::ICudaEngine> engine{runtime->deserializeCudaEngine(plan.data(), plan.size())};
    require(engine != nullptr, path + " was built by another TensorRT or for another GPU");
    std::unique_ptr<nvinfer1::IExecutionContext> context{engine->createExecutionContext()};
    require(context != nullptr, "there is too little memory on the GPU");
    cudaStream_t stream{};
    check(cudaStreamCreate(&stream));

    std::map<std::string, DeviceBuffer> buffers;
    std::vector<std::string> outputs;
    // All inputs first: the shapes of the outputs follow from theirs.
    for (auto const mode : {nvinfer1::TensorIOMode::kINPUT, nvinfer1::TensorIOMode::kOUTPUT}) {
        for (int i = 0; i < engine->getNbIOTensors(); ++i) {
            char const* name = engine->getIOTensorName(i);
            if (engine->getTensorIOMode(name) != mode) continue;
            auto const type = engine->getTensorDataType(name);
            bool const isInput = mode == nvinfer1::TensorIOMode::kINPUT;
            auto shape = isInput ? engine->getTensorShape(name) : context->getTensorShape(name);
            if (isInput) {
                require(golden.count(name) == 1, std::string("no file is given for the input ") + name);
                Bytes const& values = golden.at(name);
                if (shape.d[0] < 0) {
                    shape.d[0] = 1;
                    shape.d[0] = static_cast<std::int64_t>(values.size() / countBytes(shape, type));
                }
                require(countBytes(shape, type) == values.size(), std::string("the file has another size than ") + name);
                require(context->setInputShape(name, shape), std::string("the plan refuses this batch for ") + name);
            }
            void* data = (buffers[name] = allocate(countBytes(shape, type))).get();
            require(context->setTensorAddress(name, data), std::string("no address can be set for ") + name);
            if (isInput) {
                Bytes const& values = golden.at(name);
                check(cudaMemcpyAsync(data, values.data(), values.size(), cudaMemcpyHostToDevice, stream));
            } else if (golden.count(name)) {
                outputs.emplace_back(name);
            }
        }
    }
    require(!outputs.empty(), "no file is given for an output");
    require(context->enqueueV3(stream), "the engine did not run");

    bool good = true;
    for (auto const& name : outputs) {
        auto const type = engine->getTensorDataType(name.c_str());
        Bytes const& expected = golden.at(name);
        Bytes found(countBytes(context->getTensorShape(name.c_str()), type));
        require(found.size() == expected.size(), "the file has another size than " + name);
        check(cudaMemcpyAsync(found.data(), buffers.at(name).get(), found.size(), cudaMemcpyDeviceToHost, stream));
        check(cudaStreamSynchronize(stream));
        double const relative = relativeDifference(expected, found, type);
        bool const agrees = relative <= kMaxRelative;
        std::cout << name << ": " << (agrees ? "ok" : "FAILED") << ", differs by " << relative << " relative\n";
        good = good && agrees;
    }
    check(cudaStreamDestroy(stream));
    return good;
}

int main(int count, char** arguments) try {
    require(count >= 4, "usage: check_golden PLAN TENSOR:FILE...");
    std::map<std::string, Bytes> golden;
    for (int i = 2; i < count; ++i) {
        std::string const argument = arguments[i];
        auto const colon = argument.rfind(':');
        require(colon != std::string::npos, argument + " is not TENSOR:FILE");
        golden[argument.substr(0, colon)] = readFile(argument.substr(colon + 1));
    }
    return run(arguments[1], golden) ? 0 : 1;
} catch (std::exception const& error) {
    std::cerr << "error: " << error.what() << '\n';
    return 2;
}
