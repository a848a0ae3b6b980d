// TensorRT's part in the life of a native plugin, played for the library that is named on the command line.
//
//     driver LIBRARY            everything that needs no GPU
//     driver LIBRARY MANIFEST   one op on real buffers, repeatedly, on two streams; outputs go to files
//
// A manifest has a line for each thing: "op NAME", "attribute NAME f|i VALUE", "input TYPE FILE SIZE...", and
// "output TYPE FILE SIZE...", types as numbers of nvinfer1::DataType.

#include <NvInfer.h>
#include <NvInferRuntime.h>
#include <cuda.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <iterator>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

using namespace nvinfer1;

namespace {

#define CHECK(condition)                                                                     \
    do {                                                                                     \
        if (!(condition)) {                                                                  \
            std::fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition);     \
            std::exit(1);                                                                    \
        }                                                                                    \
    } while (false)

struct Log : ILogger {
    std::string last;
    void log(Severity, AsciiChar const* message) noexcept override { last = message; }
} gLog;

struct Finder : ILoggerFinder {
    ILogger* findLogger() override { return &gLog; }
} gFinder;

struct Expression : IDimensionExpr {
    struct Implementation : apiv::VDimensionExpr {
        bool isConstant() const override { return false; }
        int64_t getConstantValue() const override { return 0; }
        bool isSizeTensor() const override { return false; }
    } implementation;
    Expression() { mImpl = &implementation; }
};

struct Builder : IExprBuilder {};

using Fields = std::vector<PluginField>;
using Owned = std::unique_ptr<IPluginV3>;

struct Library {
    IPluginCreatorInterface* const* creators{};
    int32_t count{};

    explicit Library(char const* path) {
        void* const handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
        if (handle == nullptr) {
            std::fprintf(stderr, "%s\n", dlerror());
            std::exit(1);
        }
        reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(handle, "setLoggerFinder"))(&gFinder);
        auto const get = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(handle, "getCreators"));
        creators = get(count);
    }

    IPluginCreatorV3One& of(std::string const& name) const {
        for (int32_t i = 0; i < count; ++i) {
            CHECK(std::strcmp(creators[i]->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") == 0);
            auto& creator = static_cast<IPluginCreatorV3One&>(*creators[i]);
            if (name == creator.getPluginName()) {
                return creator;
            }
        }
        std::fprintf(stderr, "no creator of %s\n", name.c_str());
        std::exit(1);
    }
};

IPluginV3* create(IPluginCreatorV3One& creator, Fields const& fields, TensorRTPhase phase = TensorRTPhase::kBUILD) {
    PluginFieldCollection const collection{static_cast<int32_t>(fields.size()), fields.data()};
    return creator.createPlugin("node", &collection, phase);
}

template <typename Interface>
Interface& as(IPluginV3& plugin, PluginCapabilityType type) {
    auto* const found = plugin.getCapabilityInterface(type);
    CHECK(found != nullptr);
    return *static_cast<Interface*>(found);
}

IPluginV3OneBuild& build(IPluginV3& plugin) { return as<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD); }
IPluginV3OneRuntime& runtime(IPluginV3& plugin) {
    return as<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
}

std::string serialized(IPluginV3& plugin) {
    PluginFieldCollection const* const fields = runtime(plugin).getFieldsToSerialize();
    std::string text;
    for (int32_t i = 0; i < fields->nbFields; ++i) {
        PluginField const& field = fields->fields[i];
        text += std::string{field.name} + '=' + std::string{static_cast<char const*>(field.data), 4} + ';';
    }
    return text;
}

// What an op looks like from outside, said again and apart from the library.
struct Expected {
    char const* name;
    std::vector<DataType> inputs, outputs;
    std::vector<int32_t> ranks;
    std::vector<std::vector<std::pair<int32_t, int32_t>>> shapes;  // input and axis of each size of an output
    std::vector<char const*> reals, integers;
};

constexpr DataType F = DataType::kFLOAT, H = DataType::kHALF, I = DataType::kINT32, L = DataType::kINT64,
                   B = DataType::kBOOL, G = DataType::kBF16;

std::vector<Expected> const gExpected{
    {"token_moments", {H}, {F, F, F, F}, {4},
     {{{0, 0}, {0, 1}, {0, 3}}, {{0, 0}, {0, 1}, {0, 3}}, {{0, 0}, {0, 1}, {0, 3}}, {{0, 0}, {0, 1}}}, {}, {"center"}},
    {"token_moments_masked", {G, B}, {F, F, F, F}, {4, 3},
     {{{0, 0}, {0, 1}, {0, 3}}, {{0, 0}, {0, 1}, {0, 3}}, {{0, 0}, {0, 1}, {0, 3}}, {{0, 0}, {0, 1}}}, {}, {"center"}},
    {"plan", {F, F, F, F, F, F, F, F, F, L}, {I, I, F}, {3, 3, 3, 2, 3, 3, 2, 3, 3, 2},
     {{{0, 0}, {0, 1}}, {{0, 0}, {0, 1}}, {{0, 0}, {0, 1}}}, {"scale", "limit"}, {}},
    {"adaptive_attention", {H, H, H, F, F, I, I}, {H}, {4, 4, 4, 3, 3, 2, 2},
     {{{0, 0}, {0, 1}, {0, 2}, {0, 3}}}, {"scale"}, {"is_causal"}},
    {"adaptive_attention_masked", {F, F, F, F, F, I, I, B}, {F}, {4, 4, 4, 3, 3, 2, 2, 4},
     {{{0, 0}, {0, 1}, {0, 2}, {0, 3}}}, {"scale"}, {"is_causal"}},
    {"adaptive_attention_biased", {G, G, G, F, F, I, I, F}, {G}, {4, 4, 4, 3, 3, 2, 2, 4},
     {{{0, 0}, {0, 1}, {0, 2}, {0, 3}}}, {"scale"}, {"is_causal"}},
};

float const gReal = 0.25F;
int32_t const gInteger = 1;

Fields fieldsOf(Expected const& op) {
    Fields fields;
    for (char const* name : op.reals) {
        fields.emplace_back(name, &gReal, PluginFieldType::kFLOAT32, 1);
    }
    for (char const* name : op.integers) {
        fields.emplace_back(name, &gInteger, PluginFieldType::kINT32, 1);
    }
    return fields;
}

void checkCreation(IPluginCreatorV3One& creator, Expected const& op) {
    CHECK(std::strcmp(creator.getPluginNamespace(), "adaattn") == 0);
    CHECK(std::strcmp(creator.getPluginVersion(), "1") == 0);
    Fields const fields = fieldsOf(op);
    PluginFieldCollection const* const declared = creator.getFieldNames();
    CHECK(declared->nbFields == static_cast<int32_t>(fields.size()));
    for (int32_t i = 0; i < declared->nbFields; ++i) {
        bool found = false;
        for (PluginField const& field : fields) {
            found = found || (std::strcmp(field.name, declared->fields[i].name) == 0 &&
                              field.type == declared->fields[i].type);
        }
        CHECK(found);
    }
    Owned const plugin{create(creator, fields)};
    CHECK(plugin != nullptr);
    Owned const cloned{plugin->clone()};
    CHECK(serialized(*cloned) == serialized(*plugin));
    PluginFieldCollection const* const kept = runtime(*plugin).getFieldsToSerialize();
    Owned const again{creator.createPlugin("node", kept, TensorRTPhase::kRUNTIME)};
    CHECK(again != nullptr);
    CHECK(serialized(*again) == serialized(*plugin));
    Owned const attached{runtime(*plugin).attachToContext(nullptr)};
    CHECK(serialized(*attached) == serialized(*plugin));
    auto& core = as<IPluginV3OneCore>(*plugin, PluginCapabilityType::kCORE);
    CHECK(std::strcmp(core.getPluginName(), op.name) == 0);

    CHECK(create(creator, {fields.begin() + 1, fields.end()}) == nullptr);
    CHECK(gLog.last.find("is missing") != std::string::npos);
    Fields wrong = fields;
    wrong[0].type = PluginFieldType::kFLOAT64;
    CHECK(create(creator, wrong) == nullptr);
    CHECK(gLog.last.find("not one number of its type") != std::string::npos);
    if (!op.reals.empty()) {
        float const negative = -1;
        wrong = fields;
        wrong[0].data = &negative;
        CHECK(create(creator, wrong) == nullptr);
        CHECK(gLog.last.find("at least 0") != std::string::npos);
    }
}

void checkShapes(IPluginV3& plugin, Expected const& op) {
    auto& builder = build(plugin);
    auto const inputs = static_cast<int32_t>(op.inputs.size());
    auto const outputs = static_cast<int32_t>(op.outputs.size());
    CHECK(builder.getNbOutputs() == outputs);
    std::vector<DataType> types(op.outputs.size());
    CHECK(builder.getOutputDataTypes(types.data(), outputs, op.inputs.data(), inputs) == 0);
    CHECK(types == op.outputs);
    CHECK(builder.getOutputDataTypes(types.data(), outputs, op.inputs.data(), inputs - 1) != 0);
    std::vector<Expression> sizes(static_cast<size_t>(inputs) * 4);
    std::vector<DimsExprs> given(op.inputs.size()), got(op.outputs.size());
    for (int32_t i = 0; i < inputs; ++i) {
        given[i].nbDims = op.ranks[i];
        for (int32_t axis = 0; axis < op.ranks[i]; ++axis) {
            given[i].d[axis] = &sizes[i * 4 + axis];
        }
    }
    Builder expressions;
    CHECK(builder.getOutputShapes(given.data(), inputs, nullptr, 0, got.data(), outputs, expressions) == 0);
    for (int32_t i = 0; i < outputs; ++i) {
        CHECK(got[i].nbDims == static_cast<int32_t>(op.shapes[i].size()));
        for (int32_t axis = 0; axis < got[i].nbDims; ++axis) {
            auto const [input, place] = op.shapes[i][axis];
            CHECK(got[i].d[axis] == &sizes[input * 4 + place]);
        }
    }
    given[0].nbDims = 1;
    CHECK(builder.getOutputShapes(given.data(), inputs, nullptr, 0, got.data(), outputs, expressions) != 0);
    CHECK(gLog.last.find("has 1 dimensions") != std::string::npos);
}

void checkFormats(IPluginV3& plugin, Expected const& op) {
    auto& builder = build(plugin);
    auto const inputs = static_cast<int32_t>(op.inputs.size());
    auto const outputs = static_cast<int32_t>(op.outputs.size());
    std::vector<DynamicPluginTensorDesc> descs(op.inputs.size() + op.outputs.size());
    auto const accepts = [&](int32_t place, DataType type, TensorFormat format) {
        descs[place].desc.type = type;
        descs[place].desc.format = format;
        return builder.supportsFormatCombination(place, descs.data(), inputs, outputs);
    };
    for (int32_t place = 0; place < inputs + outputs; ++place) {
        DataType const type = place < inputs ? op.inputs[place] : op.outputs[place - inputs];
        CHECK(!accepts(place, type, TensorFormat::kCHW32));
        CHECK(!accepts(place, DataType::kINT8, TensorFormat::kLINEAR));
        CHECK(accepts(place, type, TensorFormat::kLINEAR));
    }
    if (op.inputs.size() > 2 && op.inputs[1] == op.inputs[0] && op.inputs[0] != F) {
        CHECK(!accepts(1, F, TensorFormat::kLINEAR));  // query, key and value have one type
    }
}

struct Buffer {
    DataType type{};
    std::string file;
    Dims dims{};
    std::vector<char> bytes;
    CUdeviceptr memory{};
};

size_t bytesOf(Buffer const& buffer) {
    size_t const size = buffer.type == B ? 1 : buffer.type == H || buffer.type == G ? 2 : buffer.type == L ? 8 : 4;
    size_t count = size;
    for (int32_t i = 0; i < buffer.dims.nbDims; ++i) {
        count *= static_cast<size_t>(buffer.dims.d[i]);
    }
    return count;
}

template <typename Function>
Function* symbol(void* library, char const* name) {
    auto* const found = reinterpret_cast<Function*>(dlsym(library, name));
    CHECK(found != nullptr);
    return found;
}

#define CUDA(name) symbol<decltype(name)>(cuda, #name)
#define VERSIONED(name) symbol<decltype(name)>(cuda, #name "_v2")

void run(Library const& library, char const* manifest) {
    std::ifstream lines{manifest};
    std::string line, op;
    std::vector<float> reals;
    std::vector<int32_t> integers;
    reals.reserve(4);
    integers.reserve(4);
    std::vector<std::string> names;
    names.reserve(4);
    Fields fields;
    std::vector<Buffer> inputs, outputs;
    while (std::getline(lines, line)) {
        std::istringstream words{line};
        std::string what;
        words >> what;
        if (what == "op") {
            words >> op;
        } else if (what == "attribute") {
            std::string name, kind;
            double value{};
            words >> name >> kind >> value;
            names.push_back(name);
            if (kind == "f") {
                reals.push_back(static_cast<float>(value));
                fields.emplace_back(names.back().c_str(), &reals.back(), PluginFieldType::kFLOAT32, 1);
            } else {
                integers.push_back(static_cast<int32_t>(value));
                fields.emplace_back(names.back().c_str(), &integers.back(), PluginFieldType::kINT32, 1);
            }
        } else {
            Buffer buffer;
            int32_t type{};
            words >> type >> buffer.file;
            buffer.type = static_cast<DataType>(type);
            for (int64_t size{}; words >> size;) {
                buffer.dims.d[buffer.dims.nbDims++] = size;
            }
            (what == "input" ? inputs : outputs).push_back(buffer);
        }
    }

    void* const cuda = dlopen("libcuda.so.1", RTLD_NOW);
    CHECK(cuda != nullptr);
    CHECK(CUDA(cuInit)(0) == CUDA_SUCCESS);
    CUdevice device{};
    CUcontext context{};
    CHECK(CUDA(cuDeviceGet)(&device, 0) == CUDA_SUCCESS);
    CHECK(CUDA(cuDevicePrimaryCtxRetain)(&context, device) == CUDA_SUCCESS);
    CHECK(CUDA(cuCtxSetCurrent)(context) == CUDA_SUCCESS);
    auto const allocate = [&](size_t bytes) {
        CUdeviceptr memory{};
        CHECK(VERSIONED(cuMemAlloc)(&memory, bytes > 0 ? bytes : 1) == CUDA_SUCCESS);
        return memory;
    };
    std::vector<DynamicPluginTensorDesc> descs;
    std::vector<PluginTensorDesc> plain;
    std::vector<void*> pointers;
    for (auto* group : {&inputs, &outputs}) {
        for (Buffer& buffer : *group) {
            buffer.memory = allocate(bytesOf(buffer));
            pointers.push_back(reinterpret_cast<void*>(buffer.memory));
            PluginTensorDesc const desc{buffer.dims, buffer.type, TensorFormat::kLINEAR, 1.0F};
            plain.push_back(desc);
            descs.push_back({desc, buffer.dims, buffer.dims, buffer.dims});
        }
    }
    for (Buffer& buffer : inputs) {
        std::ifstream file{buffer.file, std::ios::binary};
        buffer.bytes.assign(std::istreambuf_iterator<char>{file}, {});
        CHECK(buffer.bytes.size() == bytesOf(buffer));
        CHECK(VERSIONED(cuMemcpyHtoD)(buffer.memory, buffer.bytes.data(), buffer.bytes.size()) == CUDA_SUCCESS);
    }

    Owned const built{create(library.of(op), fields)};
    CHECK(built != nullptr);
    auto const nbInputs = static_cast<int32_t>(inputs.size()), nbOutputs = static_cast<int32_t>(outputs.size());
    auto const* const of_outputs = descs.data() + nbInputs;
    CHECK(build(*built).configurePlugin(descs.data(), nbInputs, of_outputs, nbOutputs) == 0);
    size_t const workspace = build(*built).getWorkspaceSize(descs.data(), nbInputs, of_outputs, nbOutputs);
    for (int32_t repeat = 0; repeat < 4; ++repeat) {
        CUstream stream{};
        CHECK(CUDA(cuStreamCreate)(&stream, repeat % 2 == 0 ? CU_STREAM_NON_BLOCKING : CU_STREAM_DEFAULT) ==
              CUDA_SUCCESS);
        CUdeviceptr const scratch = allocate(workspace);
        Owned const plugin{runtime(*built).attachToContext(nullptr)};
        CHECK(runtime(*plugin).onShapeChange(plain.data(), nbInputs, plain.data() + nbInputs, nbOutputs) == 0);
        CHECK(runtime(*plugin).enqueue(plain.data(), plain.data() + nbInputs, pointers.data(),
                                       pointers.data() + nbInputs, reinterpret_cast<void*>(scratch), stream) == 0);
        CHECK(CUDA(cuStreamSynchronize)(stream) == CUDA_SUCCESS);
        for (Buffer& buffer : outputs) {
            std::vector<char> bytes(bytesOf(buffer));
            CHECK(VERSIONED(cuMemcpyDtoH)(bytes.data(), buffer.memory, bytes.size()) == CUDA_SUCCESS);
            CHECK(repeat == 0 || bytes == buffer.bytes);
            buffer.bytes = bytes;
        }
    }
    for (Buffer const& buffer : outputs) {
        std::ofstream{buffer.file, std::ios::binary}.write(buffer.bytes.data(),
                                                           static_cast<std::streamsize>(buffer.bytes.size()));
    }
}

}  // namespace

int main(int argc, char** argv) {
    CHECK(argc == 2 || argc == 3);
    Library const library{argv[1]};
    if (argc == 3) {
        run(library, argv[2]);
        return 0;
    }
    CHECK(library.count == static_cast<int32_t>(gExpected.size()));
    for (Expected const& op : gExpected) {
        IPluginCreatorV3One& creator = library.of(op.name);
        checkCreation(creator, op);
        Owned const plugin{create(creator, fieldsOf(op))};
        checkShapes(*plugin, op);
        checkFormats(*plugin, op);
    }
    std::puts("all as expected");
    return 0;
}
