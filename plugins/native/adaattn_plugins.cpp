// AdaAttn's ops as TensorRT plugins: IPluginV3 around kernels that are embedded beside this file.
//
// What the ops are, which kernels there are and with what they are launched is generated (plugins.inc), from the table
// that eager mode and the Python plugins read too. The CUDA driver is opened when it is first needed: the library loads
// on a machine without one. One long file, since a library with one class needs no header: what is generated,
// messages, the driver, a call, the plugin, the exported functions.

#include <NvInfer.h>
#include <NvInferRuntime.h>
#include <cuda.h>
#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "images.inc"  // the kernels' code, of C linkage

namespace adaattn {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;
using nvinfer1::PluginTensorDesc;
using Severity = nvinfer1::ILogger::Severity;

constexpr char const* kNAMESPACE = "adaattn";
constexpr char const* kVERSION = "1";
constexpr int32_t kMAX_INPUTS = 10;
constexpr int32_t kMAX_OUTPUTS = 4;

// ---- what is generated -----------------------------------------------------------------------------------------------

struct Attribute {
    char const* name;
    bool real;  // else an integer
};

struct AxisRef {
    int32_t input, axis;
};

struct Op {
    char const* name;
    int32_t inputs;
    std::array<uint32_t, kMAX_INPUTS> types;  // a bit for each DataType that an input may have
    std::array<int32_t, kMAX_INPUTS> ranks;
    int32_t outputs;
    std::array<int32_t, kMAX_OUTPUTS> outputTypes;  // a DataType, or -1 for that of the first input
    std::array<std::array<AxisRef, 4>, kMAX_OUTPUTS> shapes;
    std::array<int32_t, kMAX_OUTPUTS> outputRanks;
    int32_t sameType;  // how many of the first inputs have one type
    int32_t mask;      // which input is a mask, or -1
    std::array<AxisRef, 4> maskSizes;  // what the dimensions of a mask are if they are not 1
    std::array<Attribute, 2> attributes;
    int32_t nbAttributes;
};

struct Kernel {
    char const* entry;
    uint32_t threads, shared;
    unsigned char const* cubin;
    unsigned char const* ptx;  // null where the code uses features of one architecture
};

struct Call;

struct Program {
    char const* op;
    int32_t arch;
    std::array<int32_t, kMAX_INPUTS> types;
    int32_t headDim, flag, ones;  // ones: a bit for each dimension of the mask that is 1
    int64_t (*scratch)(Call const&);
    int32_t (*run)(Call const&);
    int32_t steps;
    std::array<int32_t, 6> kernels;  // of each step
};

// ---- messages --------------------------------------------------------------------------------------------------------

nvinfer1::ILoggerFinder* gFinder{nullptr};

void log(Severity severity, std::string const& text) {
    std::string const line = "AdaAttn: " + text;
    nvinfer1::ILogger* const logger = gFinder != nullptr ? gFinder->findLogger() : nullptr;
    if (logger != nullptr) {
        logger->log(severity, line.c_str());
    } else {
        std::fprintf(stderr, "%s\n", line.c_str());
    }
}

int32_t fail(std::string const& text) {
    log(Severity::kERROR, text);
    return -1;
}

// ---- the CUDA driver -------------------------------------------------------------------------------------------------

struct Driver {
    decltype(&cuInit) init{};
    decltype(&cuGetErrorName) errorName{};
    decltype(&cuCtxGetCurrent) currentContext{};
    decltype(&cuCtxGetDevice) device{};
    decltype(&cuDeviceGet) deviceGet{};
    decltype(&cuDeviceGetAttribute) attribute{};
    decltype(&cuModuleLoadData) load{};
    decltype(&cuModuleGetFunction) function{};
    decltype(&cuFuncSetAttribute) set{};
    decltype(&cuLaunchKernel) launch{};
    bool there{false};

    Driver() {
        void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
        if (library == nullptr) {
            return;
        }
        bool found = true;
        auto const find = [&](auto& pointer, char const* name) {
            pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(dlsym(library, name));
            found = found && pointer != nullptr;
        };
        find(init, "cuInit");
        find(errorName, "cuGetErrorName");
        find(currentContext, "cuCtxGetCurrent");
        find(device, "cuCtxGetDevice");
        find(deviceGet, "cuDeviceGet");
        find(attribute, "cuDeviceGetAttribute");
        find(load, "cuModuleLoadData");
        find(function, "cuModuleGetFunction");
        find(set, "cuFuncSetAttribute");
        find(launch, "cuLaunchKernel");
        there = found && init(0) == CUDA_SUCCESS;
    }

    bool ok(CUresult code, std::string const& what) const {
        if (code == CUDA_SUCCESS) {
            return true;
        }
        char const* name = nullptr;
        errorName(code, &name);
        fail(what + " failed with " + (name != nullptr ? name : std::to_string(code)));
        return false;
    }

    // Of the current context's GPU, or of the first: 90 for compute capability 9.0; 0 without one.
    int32_t arch() const {
        CUdevice gpu{};
        int major{}, minor{};
        if (!there || (device(&gpu) != CUDA_SUCCESS && deviceGet(&gpu, 0) != CUDA_SUCCESS) ||
            attribute(&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, gpu) != CUDA_SUCCESS ||
            attribute(&minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, gpu) != CUDA_SUCCESS) {
            return 0;
        }
        return 10 * major + minor;
    }
};

Driver const& driver() {
    static Driver const instance;
    return instance;
}

// The function of a kernel in the current context; each module is loaded once per context and kept.
bool loadFunction(Kernel const& kernel, bool ptx, CUfunction& function) {
    static std::mutex guard;
    static std::map<std::pair<CUcontext, Kernel const*>, CUfunction> loaded;
    CUcontext context{};
    if (!driver().ok(driver().currentContext(&context), "cuCtxGetCurrent")) {
        return false;
    }
    std::lock_guard<std::mutex> const lock{guard};
    auto const found = loaded.find({context, &kernel});
    if (found != loaded.end()) {
        function = found->second;
        return true;
    }
    CUmodule module{};
    std::string const name = kernel.entry;
    if (!driver().ok(driver().load(&module, ptx ? kernel.ptx : kernel.cubin), "loading " + name) ||
        !driver().ok(driver().function(&function, module, kernel.entry), "finding " + name) ||
        !driver().ok(driver().set(function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                                  static_cast<int>(kernel.shared)),
                     name + " in " + std::to_string(kernel.shared) + " bytes of shared memory")) {
        return false;
    }
    loaded[{context, &kernel}] = function;
    return true;
}

// ---- a call ----------------------------------------------------------------------------------------------------------

struct Call {
    Dims const* dims;  // of the inputs
    void const* const* inputs;
    void* const* outputs;
    char* workspace;
    float scale, limit;
    CUfunction const* functions;  // of the program's kernels
    CUstream stream;

    int64_t size(int32_t input, int32_t axis) const { return dims[input].d[axis]; }

    int32_t launch(int32_t step, Kernel const& kernel, int64_t programs, void** arguments) const {
        if (programs == 0) {
            return 0;
        }
        CUresult const code = driver().launch(functions[step], static_cast<unsigned>(programs), 1, 1, kernel.threads,
                                              1, 1, kernel.shared, stream, arguments, nullptr);
        return driver().ok(code, std::string{"launching "} + kernel.entry) ? 0 : -1;
    }
};

int64_t ceilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t aligned(int64_t bytes) { return (bytes + 255) / 256 * 256; }

#include "plugins.inc"  // OPS, KERNELS, PROGRAMS and the functions that they name

std::string shapeOf(Dims const& dims) {
    std::ostringstream text;
    text << '(';
    for (int32_t i = 0; i < dims.nbDims; ++i) {
        text << (i != 0 ? ", " : "") << dims.d[i];
    }
    text << ')';
    return text.str();
}

// The program of a node on an architecture, and whether as PTX; null where the library holds none.
Program const* findProgram(Op const& op, int32_t flag, DataType const* types, Dims const* dims, int32_t arch, bool& ptx) {
    Program const* best = nullptr;
    for (Program const& program : PROGRAMS) {
        Dims const& first = dims[0];
        bool fits = std::strcmp(program.op, op.name) == 0 && program.flag == flag &&
                    first.d[first.nbDims - 1] == program.headDim;
        for (int32_t i = 0; fits && i < op.inputs; ++i) {
            fits = program.types[i] == static_cast<int32_t>(types[i]);
        }
        for (int32_t axis = 0; fits && op.mask >= 0 && axis < op.ranks[op.mask]; ++axis) {
            AxisRef const pick = op.maskSizes[axis];
            bool const one = (program.ones >> axis & 1) != 0;
            fits = dims[op.mask].d[axis] == (one ? 1 : dims[pick.input].d[pick.axis]);
        }
        if (!fits || program.arch > arch) {
            continue;
        }
        // Machine code runs on its own architecture, and up to sm_89 on later ones of its generation.
        bool const native = program.arch == arch || (program.arch < 90 && program.arch / 10 == arch / 10);
        if (!native && KERNELS[program.kernels[0]].ptx == nullptr) {
            continue;
        }
        if (best == nullptr || program.arch > best->arch) {
            best = &program;
            ptx = !native;
        }
    }
    return best;
}

// ---- the plugin ------------------------------------------------------------------------------------------------------

struct Values {
    float scale{0}, limit{0};
    int32_t flag{0};

    void* of(Attribute const& attribute) {
        if (!attribute.real) {
            return &flag;
        }
        return std::strcmp(attribute.name, "scale") == 0 ? &scale : &limit;
    }
};

class Plugin : public nvinfer1::IPluginV3,
               public nvinfer1::IPluginV3OneCore,
               public nvinfer1::IPluginV3OneBuild,
               public nvinfer1::IPluginV3OneRuntime {
public:
    Plugin(Op const& op, Values const& values) : mOp{op}, mValues{values} {}

    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override {
        switch (type) {
            case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
            case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
            case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
        }
        return nullptr;
    }

    nvinfer1::IPluginV3* clone() noexcept override { return new Plugin{mOp, mValues}; }

    nvinfer1::AsciiChar const* getPluginName() const noexcept override { return mOp.name; }
    nvinfer1::AsciiChar const* getPluginVersion() const noexcept override { return kVERSION; }
    nvinfer1::AsciiChar const* getPluginNamespace() const noexcept override { return kNAMESPACE; }

    // build

    int32_t getNbOutputs() const noexcept override { return mOp.outputs; }

    int32_t getOutputDataTypes(DataType* outputTypes, int32_t nbOutputs, DataType const* inputTypes,
                               int32_t nbInputs) const noexcept override {
        if (nbInputs != mOp.inputs || nbOutputs != mOp.outputs) {
            return wrongNumber(nbInputs, nbOutputs);
        }
        for (int32_t i = 0; i < nbOutputs; ++i) {
            outputTypes[i] = mOp.outputTypes[i] < 0 ? inputTypes[0] : static_cast<DataType>(mOp.outputTypes[i]);
        }
        return 0;
    }

    int32_t getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t nbInputs, nvinfer1::DimsExprs const*, int32_t,
                            nvinfer1::DimsExprs* outputs, int32_t nbOutputs,
                            nvinfer1::IExprBuilder&) noexcept override {
        if (nbInputs != mOp.inputs || nbOutputs != mOp.outputs) {
            return wrongNumber(nbInputs, nbOutputs);
        }
        for (int32_t i = 0; i < nbInputs; ++i) {
            if (inputs[i].nbDims != mOp.ranks[i]) {
                return fail(std::string{mOp.name} + ": input " + std::to_string(i) + " has " +
                            std::to_string(inputs[i].nbDims) + " dimensions; expected " +
                            std::to_string(mOp.ranks[i]));
            }
        }
        for (int32_t i = 0; i < nbOutputs; ++i) {
            outputs[i].nbDims = mOp.outputRanks[i];
            for (int32_t axis = 0; axis < outputs[i].nbDims; ++axis) {
                AxisRef const pick = mOp.shapes[i][axis];
                outputs[i].d[axis] = inputs[pick.input].d[pick.axis];
            }
        }
        return 0;
    }

    bool supportsFormatCombination(int32_t pos, nvinfer1::DynamicPluginTensorDesc const* inOut, int32_t nbInputs,
                                   int32_t) noexcept override {
        PluginTensorDesc const& tensor = inOut[pos].desc;
        if (tensor.format != nvinfer1::TensorFormat::kLINEAR) {
            return false;
        }
        DataType const first = inOut[0].desc.type;
        if (pos >= nbInputs) {
            int32_t const type = mOp.outputTypes[pos - nbInputs];
            return tensor.type == (type < 0 ? first : static_cast<DataType>(type));
        }
        if (pos > 0 && pos < mOp.sameType && tensor.type != first) {
            return false;
        }
        return (mOp.types[pos] >> static_cast<int32_t>(tensor.type) & 1U) != 0;
    }

    int32_t configurePlugin(nvinfer1::DynamicPluginTensorDesc const* in, int32_t nbInputs,
                            nvinfer1::DynamicPluginTensorDesc const*, int32_t nbOutputs) noexcept override {
        if (nbInputs != mOp.inputs || nbOutputs != mOp.outputs) {
            return wrongNumber(nbInputs, nbOutputs);
        }
        return choose(in) != nullptr ? 0 : -1;
    }

    size_t getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t,
                            nvinfer1::DynamicPluginTensorDesc const*, int32_t) const noexcept override {
        std::array<Dims, kMAX_INPUTS> dims{};
        for (int32_t i = 0; i < mOp.inputs; ++i) {
            dims[i] = inputs[i].max;
        }
        Program const* const program = choose(inputs);
        return program == nullptr ? 0 : static_cast<size_t>(program->scratch(call(dims.data())));
    }

    // runtime

    int32_t onShapeChange(PluginTensorDesc const* in, int32_t nbInputs, PluginTensorDesc const*,
                          int32_t nbOutputs) noexcept override {
        if (nbInputs != mOp.inputs || nbOutputs != mOp.outputs) {
            return wrongNumber(nbInputs, nbOutputs);
        }
        std::array<DataType, kMAX_INPUTS> types{};
        for (int32_t i = 0; i < nbInputs; ++i) {
            mDims[i] = in[i].dims;
            types[i] = in[i].type;
        }
        mProgram = find(types.data(), mDims.data(), mPtx);
        if (mProgram == nullptr) {
            return -1;
        }
        // Now and not in enqueue, which may be captured in a CUDA graph.
        for (int32_t i = 0; i < mProgram->steps; ++i) {
            if (!loadFunction(KERNELS[mProgram->kernels[i]], mPtx, mFunctions[i])) {
                return -1;
            }
        }
        return 0;
    }

    int32_t enqueue(PluginTensorDesc const*, PluginTensorDesc const*, void const* const* inputs, void* const* outputs,
                    void* workspace, cudaStream_t stream) noexcept override {
        if (mProgram == nullptr) {
            return fail(std::string{mOp.name} + ": enqueue before a shape was accepted");
        }
        Call made = call(mDims.data());
        made.inputs = inputs;
        made.outputs = outputs;
        made.workspace = static_cast<char*>(workspace);
        made.functions = mFunctions.data();
        made.stream = reinterpret_cast<CUstream>(stream);
        return mProgram->run(made);
    }

    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override { return clone(); }

    nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept override {
        mFields.clear();
        for (int32_t i = 0; i < mOp.nbAttributes; ++i) {
            Attribute const& attribute = mOp.attributes[i];
            PluginFieldType const type = attribute.real ? PluginFieldType::kFLOAT32 : PluginFieldType::kINT32;
            mFields.emplace_back(attribute.name, mValues.of(attribute), type, 1);
        }
        mCollection = {static_cast<int32_t>(mFields.size()), mFields.data()};
        return &mCollection;
    }

private:
    int32_t wrongNumber(int32_t inputs, int32_t outputs) const {
        return fail(std::string{mOp.name} + " got " + std::to_string(inputs) + " inputs and " +
                    std::to_string(outputs) + " outputs; expected " + std::to_string(mOp.inputs) + " and " +
                    std::to_string(mOp.outputs));
    }

    Call call(Dims const* dims) const {
        return Call{dims, nullptr, nullptr, nullptr, mValues.scale, mValues.limit, nullptr, nullptr};
    }

    Program const* choose(nvinfer1::DynamicPluginTensorDesc const* in) const {
        std::array<DataType, kMAX_INPUTS> types{};
        std::array<Dims, kMAX_INPUTS> dims{};
        for (int32_t i = 0; i < mOp.inputs; ++i) {
            types[i] = in[i].desc.type;
            dims[i] = in[i].max;
        }
        bool ptx{};
        return find(types.data(), dims.data(), ptx);
    }

    Program const* find(DataType const* types, Dims const* dims, bool& ptx) const {
        int32_t const arch = driver().arch();
        if (arch == 0) {
            fail("the CUDA driver shows no GPU");
            return nullptr;
        }
        Program const* const program = findProgram(mOp, mValues.flag, types, dims, arch, ptx);
        if (program == nullptr) {
            std::ostringstream text;
            text << mOp.name << ": this library has no kernel for sm_" << arch << " and";
            for (int32_t i = 0; i < mOp.inputs; ++i) {
                text << ' ' << shapeOf(dims[i]) << " of type " << static_cast<int32_t>(types[i]);
            }
            text << "; it has";
            for (Program const& held : PROGRAMS) {
                if (std::strcmp(held.op, mOp.name) == 0) {
                    text << " sm_" << held.arch << "/head_dim " << held.headDim << "/type " << held.types[0];
                }
            }
            text << ". Build it for the model: adaattn-plugins build model.onnx --arch " << arch;
            fail(text.str());
        }
        return program;
    }

    Op const& mOp;
    Values mValues;
    std::vector<PluginField> mFields;
    nvinfer1::PluginFieldCollection mCollection{};
    std::array<Dims, kMAX_INPUTS> mDims{};
    Program const* mProgram{nullptr};
    bool mPtx{false};
    std::array<CUfunction, 6> mFunctions{};
};

class Creator : public nvinfer1::IPluginCreatorV3One {
public:
    explicit Creator(Op const& op) : mOp{op} {
        for (int32_t i = 0; i < op.nbAttributes; ++i) {
            Attribute const& attribute = op.attributes[i];
            mFields.emplace_back(attribute.name, nullptr,
                                 attribute.real ? PluginFieldType::kFLOAT32 : PluginFieldType::kINT32, 1);
        }
        mCollection = {static_cast<int32_t>(mFields.size()), mFields.data()};
    }

    nvinfer1::IPluginV3* createPlugin(nvinfer1::AsciiChar const*, nvinfer1::PluginFieldCollection const* fields,
                                      nvinfer1::TensorRTPhase) noexcept override {
        Values values;
        for (int32_t i = 0; i < mOp.nbAttributes; ++i) {
            Attribute const& attribute = mOp.attributes[i];
            PluginField const* const field = find(fields, attribute.name);
            auto const wanted = attribute.real ? PluginFieldType::kFLOAT32 : PluginFieldType::kINT32;
            if (field == nullptr || field->type != wanted || field->length != 1 || field->data == nullptr) {
                fail(std::string{mOp.name} + ": attribute " + attribute.name + " is " +
                     (field == nullptr ? "missing" : "not one number of its type") + "; give a " +
                     (attribute.real ? "float" : "32-bit integer"));
                return nullptr;
            }
            std::memcpy(values.of(attribute), field->data, sizeof(int32_t));
        }
        if (!(values.scale >= 0)) {
            fail(std::string{mOp.name} + ": scale is " + std::to_string(values.scale) +
                 "; give one of at least 0, and put the sign into the queries");
            return nullptr;
        }
        values.flag = values.flag != 0 ? 1 : 0;
        std::ostringstream text;
        text << mOp.name << " created";
        for (int32_t i = 0; i < mOp.nbAttributes; ++i) {
            Attribute const& attribute = mOp.attributes[i];
            text << ", " << attribute.name << ' ';
            if (attribute.real) {
                text << *static_cast<float*>(values.of(attribute));
            } else {
                text << values.flag;
            }
        }
        log(Severity::kVERBOSE, text.str());
        return new Plugin{mOp, values};
    }

    nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override { return &mCollection; }
    nvinfer1::AsciiChar const* getPluginName() const noexcept override { return mOp.name; }
    nvinfer1::AsciiChar const* getPluginVersion() const noexcept override { return kVERSION; }
    nvinfer1::AsciiChar const* getPluginNamespace() const noexcept override { return kNAMESPACE; }

private:
    static PluginField const* find(nvinfer1::PluginFieldCollection const* fields, char const* name) {
        for (int32_t i = 0; fields != nullptr && i < fields->nbFields; ++i) {
            if (std::strcmp(fields->fields[i].name, name) == 0) {
                return &fields->fields[i];
            }
        }
        return nullptr;
    }

    Op const& mOp;
    std::vector<PluginField> mFields;
    nvinfer1::PluginFieldCollection mCollection{};
};

std::vector<nvinfer1::IPluginCreatorInterface*> const& creators() {
    static std::vector<std::unique_ptr<Creator>> owned;
    static std::vector<nvinfer1::IPluginCreatorInterface*> const all = [] {
        std::vector<nvinfer1::IPluginCreatorInterface*> found;
        for (Op const& op : OPS) {
            owned.push_back(std::make_unique<Creator>(op));
            found.push_back(owned.back().get());
        }
        return found;
    }();
    return all;
}

}  // namespace
}  // namespace adaattn

// What a plugin registry asks a library for (IPluginRegistry::loadLibrary, trtexec --dynamicPlugins).
extern "C" __attribute__((visibility("default"))) nvinfer1::IPluginCreatorInterface* const* getCreators(
    int32_t& nbCreators) {
    nbCreators = static_cast<int32_t>(adaattn::creators().size());
    return adaattn::creators().data();
}

extern "C" __attribute__((visibility("default"))) void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
    adaattn::gFinder = finder;
}

// For a program that opens the library itself, with dlopen, when TensorRT is in the process already; its registry would
// refuse to load a library whose plugins are registered, so this is not done unasked. Returns how many it took.
extern "C" __attribute__((visibility("default"))) int32_t adaattnRegister() {
    // By the version of the headers: registries of other versions have other virtual tables.
    std::string const name = "libnvinfer.so." + std::to_string(NV_TENSORRT_MAJOR);
    void* const library = dlopen(name.c_str(), RTLD_LAZY | RTLD_NOLOAD);
    using Registry = nvinfer1::IPluginRegistry* (*)();
    auto const find = library == nullptr ? nullptr : reinterpret_cast<Registry>(dlsym(library, "getPluginRegistry"));
    if (find == nullptr) {
        adaattn::fail(name + " is not in this process: load TensorRT first, of the version of the library's headers");
        return 0;
    }
    int32_t taken = 0;
    for (nvinfer1::IPluginCreatorInterface* creator : adaattn::creators()) {
        taken += find()->registerCreator(*creator, adaattn::kNAMESPACE) ? 1 : 0;
    }
    return taken;
}

namespace {
// ONNX Runtime's trt_extra_plugin_lib_paths and Triton Inference Server's --backend-config=tensorrt,plugins= do no more
// than dlopen: set ADAATTN_REGISTER=1 for them.
[[maybe_unused]] int32_t const registered = [] {
    char const* const wanted = std::getenv("ADAATTN_REGISTER");
    return wanted != nullptr && std::strcmp(wanted, "1") == 0 ? adaattnRegister() : 0;
}();
}  // namespace
