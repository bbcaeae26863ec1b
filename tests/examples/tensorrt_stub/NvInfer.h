// A stand-in for TensorRT's C++ API, of which it declares what examples/cpp uses, in the same words. Its "plan" is a text of one
// line per tensor, `input images float -1 3 8 8`, and its "network" gives for each output the first values of the first input.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <sstream>
#include <string>
#include <vector>

namespace nvinfer1 {

enum class DataType : int32_t { kFLOAT = 0, kHALF = 1, kINT8 = 2, kINT32 = 3, kBOOL = 4, kUINT8 = 5, kINT64 = 8 };
enum class TensorIOMode : int32_t { kNONE = 0, kINPUT = 1, kOUTPUT = 2 };

struct Dims64 {
    static constexpr int32_t MAX_DIMS{8};
    int32_t nbDims;
    int64_t d[MAX_DIMS];
};
using Dims = Dims64;

class ILogger {
   public:
    enum class Severity : int32_t { kINTERNAL_ERROR = 0, kERROR = 1, kWARNING = 2, kINFO = 3, kVERBOSE = 4 };
    virtual void log(Severity severity, char const* text) noexcept = 0;
    virtual ~ILogger() = default;
};

struct StubTensor {
    std::string name;
    TensorIOMode mode;
    DataType type;
    Dims shape;
    std::size_t width() const { return type == DataType::kHALF ? 2 : type == DataType::kUINT8 ? 1 : 4; }
    std::size_t perSample() const {
        std::size_t count = width();
        for (int32_t i = 1; i < shape.nbDims; ++i) count *= static_cast<std::size_t>(shape.d[i]);
        return count;
    }
};

inline StubTensor* find(std::vector<StubTensor>& tensors, std::string const& name) {
    for (auto& tensor : tensors)
        if (tensor.name == name) return &tensor;
    return nullptr;
}

class IExecutionContext {
   public:
    explicit IExecutionContext(std::vector<StubTensor> tensors) : tensors_(std::move(tensors)) {}
    bool setInputShape(char const* name, Dims const& shape) noexcept {
        auto* tensor = find(tensors_, name);
        if (!tensor || shape.d[0] < 1 || shape.d[0] > 4) return false;
        for (auto& each : tensors_) each.shape.d[0] = shape.d[0];
        return true;
    }
    Dims getTensorShape(char const* name) const noexcept {
        auto copy = tensors_;
        return find(copy, name)->shape;
    }
    bool setTensorAddress(char const* name, void* data) noexcept {
        addresses_[name] = static_cast<char*>(data);
        return data != nullptr;
    }
    bool enqueueV3(cudaStream_t) noexcept {
        auto const& from = tensors_.front();
        for (auto const& to : tensors_) {
            if (!addresses_.count(to.name)) return false;
            if (to.mode != TensorIOMode::kOUTPUT) continue;
            std::size_t const bytes = std::min(from.perSample(), to.perSample());
            for (int64_t i = 0; i < to.shape.d[0]; ++i)
                std::memcpy(addresses_[to.name] + i * to.perSample(), addresses_[from.name] + i * from.perSample(), bytes);
        }
        return true;
    }

   private:
    std::vector<StubTensor> tensors_;
    std::map<std::string, char*> addresses_;
};

class ICudaEngine {
   public:
    explicit ICudaEngine(std::vector<StubTensor> tensors) : tensors_(std::move(tensors)) {}
    int32_t getNbIOTensors() const noexcept { return static_cast<int32_t>(tensors_.size()); }
    char const* getIOTensorName(int32_t index) const noexcept { return tensors_[index].name.c_str(); }
    TensorIOMode getTensorIOMode(char const* name) const noexcept { return get(name).mode; }
    DataType getTensorDataType(char const* name) const noexcept { return get(name).type; }
    Dims getTensorShape(char const* name) const noexcept { return get(name).shape; }
    IExecutionContext* createExecutionContext() noexcept { return new IExecutionContext(tensors_); }

   private:
    StubTensor get(char const* name) const {
        auto copy = tensors_;
        return *find(copy, name);
    }
    std::vector<StubTensor> tensors_;
};

class IRuntime {
   public:
    explicit IRuntime(ILogger& logger) : logger_(logger) {}
    ICudaEngine* deserializeCudaEngine(void const* data, std::size_t size) noexcept {
        std::istringstream text(std::string(static_cast<char const*>(data), size));
        std::vector<StubTensor> tensors;
        std::string line, mode, type;
        while (std::getline(text, line)) {
            std::istringstream words(line);
            StubTensor tensor{};
            words >> mode >> tensor.name >> type;
            tensor.mode = mode == "input" ? TensorIOMode::kINPUT : TensorIOMode::kOUTPUT;
            tensor.type = type == "half"    ? DataType::kHALF
                          : type == "uint8" ? DataType::kUINT8
                          : type == "int32" ? DataType::kINT32
                                            : DataType::kFLOAT;
            while (tensor.shape.nbDims < Dims::MAX_DIMS && words >> tensor.shape.d[tensor.shape.nbDims]) ++tensor.shape.nbDims;
            if (tensor.shape.nbDims == 0) {
                logger_.log(ILogger::Severity::kERROR, "this is not a plan");
                return nullptr;
            }
            tensors.push_back(tensor);
        }
        return new ICudaEngine(tensors);
    }

   private:
    ILogger& logger_;
};

inline IRuntime* createInferRuntime(ILogger& logger) noexcept { return new IRuntime(logger); }

}  // namespace nvinfer1
