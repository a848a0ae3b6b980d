// Run an engine that adaattn-export made, without Python and without AdaAttn:
//
//     ./run model-export/tensorrt.engine x=1,128,256
//
// Inputs are filled with ones. An engine with native plugins also needs their library: --plugins=libadaattn_plugins.so.

#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

using namespace nvinfer1;

namespace {

struct Logger : ILogger {
    void log(Severity severity, AsciiChar const* message) noexcept override {
        if (severity <= Severity::kWARNING) {
            std::fprintf(stderr, "%s\n", message);
        }
    }
};

void require(bool condition, std::string const& otherwise) {
    if (!condition) {
        std::fprintf(stderr, "%s\n", otherwise.c_str());
        std::exit(1);
    }
}

void cuda(cudaError_t code) { require(code == cudaSuccess, cudaGetErrorName(code)); }

Dims parse(std::string const& sizes) {
    Dims dims{};
    std::istringstream text{sizes};
    for (std::string size; std::getline(text, size, ',');) {
        dims.d[dims.nbDims++] = std::stoll(size);
    }
    return dims;
}

size_t count(Dims const& dims) {
    size_t product = 1;
    for (int32_t i = 0; i < dims.nbDims; ++i) {
        product *= static_cast<size_t>(dims.d[i]);
    }
    return product;
}

// A buffer of a tensor's type; inputs hold ones.
std::vector<char> filled(DataType type, size_t elements) {
    float const one = 1.0F;
    int32_t const integer = 1;
    int64_t const longer = 1;
    uint16_t const half = 0x3C00, brain = 0x3F80;
    std::map<DataType, std::pair<void const*, size_t>> const ones{
        {DataType::kFLOAT, {&one, 4}}, {DataType::kHALF, {&half, 2}},   {DataType::kBF16, {&brain, 2}},
        {DataType::kINT32, {&integer, 4}}, {DataType::kINT64, {&longer, 8}}, {DataType::kBOOL, {&integer, 1}}};
    auto const [value, size] = ones.at(type);
    std::vector<char> bytes;
    for (size_t i = 0; i < elements; ++i) {
        bytes.insert(bytes.end(), static_cast<char const*>(value), static_cast<char const*>(value) + size);
    }
    return bytes;
}

}  // namespace

int main(int argc, char** argv) {
    require(argc > 1, "usage: run ENGINE [--plugins=LIBRARY] NAME=SIZES...");
    Logger logger;
    std::map<std::string, Dims> shapes;
    std::unique_ptr<IRuntime> const runtime{createInferRuntime(logger)};
    for (int i = 2; i < argc; ++i) {
        std::string const argument = argv[i], name = argument.substr(0, argument.find('='));
        std::string const value = argument.substr(argument.find('=') + 1);
        if (name == "--plugins") {
            require(runtime->getPluginRegistry().loadLibrary(value.c_str()) != nullptr, value + " does not load");
        } else {
            shapes[name] = parse(value);
        }
    }
    std::ifstream file{argv[1], std::ios::binary};
    std::vector<char> const bytes{std::istreambuf_iterator<char>{file}, {}};
    std::unique_ptr<ICudaEngine> const engine{runtime->deserializeCudaEngine(bytes.data(), bytes.size())};
    require(engine != nullptr, std::string{"TensorRT does not open "} + argv[1]);
    std::unique_ptr<IExecutionContext> const context{engine->createExecutionContext()};
    cudaStream_t stream{};
    cuda(cudaStreamCreate(&stream));

    std::map<std::string, std::pair<void*, size_t>> outputs;
    for (bool inputs : {true, false}) {  // the shapes of outputs follow from those of inputs
        for (int32_t i = 0; i < engine->getNbIOTensors(); ++i) {
            char const* const name = engine->getIOTensorName(i);
            if ((engine->getTensorIOMode(name) == TensorIOMode::kINPUT) != inputs) {
                continue;
            }
            if (inputs) {
                require(shapes.count(name) != 0, std::string{"no sizes for the input "} + name);
                require(context->setInputShape(name, shapes[name]), std::string{"sizes out of range: "} + name);
            }
            auto const content = filled(engine->getTensorDataType(name), count(context->getTensorShape(name)));
            void* memory{};
            cuda(cudaMalloc(&memory, content.size()));
            cuda(cudaMemcpy(memory, content.data(), content.size(), cudaMemcpyHostToDevice));
            context->setTensorAddress(name, memory);
            if (!inputs) {
                outputs[name] = {memory, content.size()};
            }
        }
    }
    require(context->enqueueV3(stream), "the engine did not run");
    cuda(cudaStreamSynchronize(stream));
    for (auto const& [name, buffer] : outputs) {
        std::vector<char> content(buffer.second);
        cuda(cudaMemcpy(content.data(), buffer.first, content.size(), cudaMemcpyDeviceToHost));
        std::printf("%s: %zu bytes\n", name.c_str(), content.size());
        std::ofstream{name + ".bin", std::ios::binary}.write(content.data(), static_cast<std::streamsize>(content.size()));
    }
    return 0;
}
