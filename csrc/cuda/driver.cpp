#include "cuda/driver.h"

#include <climits>
#include <dlfcn.h>
#include <unistd.h>

namespace m3em {

// Names, types and numbers of cuda.h, where none of them has changed since CUDA 10.1. A handle is an address.
struct DriverFunctions {
    int (*cuInit)(unsigned flags);
    int (*cuGetErrorName)(int error, const char **text);
    int (*cuGetErrorString)(int error, const char **text);
    int (*cuDeviceGetCount)(int *count);
    int (*cuDeviceGet)(int *device, int ordinal);
    int (*cuDeviceGetAttribute)(int *value, int attribute, int device);
    int (*cuDevicePrimaryCtxRetain)(void **context, int device);
    int (*cuCtxGetCurrent)(void **context);
    int (*cuCtxPushCurrent_v2)(void *context);
    int (*cuCtxPopCurrent_v2)(void **context);
    int (*cuThreadExchangeStreamCaptureMode)(int *mode);
    int (*cuModuleLoadData)(void **module, const void *image);
    int (*cuModuleGetFunction)(void **function, void *module, const char *name);
    int (*cuFuncSetAttribute)(void *function, int attribute, int value);
    int (*cuFuncLoad)(void *function); // since CUDA 12.4; may be null
    int (*cuLaunchKernel)(void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                          unsigned block_y, unsigned block_z, unsigned shared, void *stream, void **arguments,
                          void **extra);
};

namespace {

constexpr int ComputeCapabilityMajor = 75, ComputeCapabilityMinor = 76, MaxSharedMemoryOptin = 97; // of a device
constexpr int MaxDynamicSharedSize = 8;                                                            // of a function
constexpr int RelaxedCapture = 2;
constexpr long long UnaskedShared = 48 << 10;

// invalid image, no binary for the card, invalid PTX, no compiler for PTX, PTX of a newer CUDA, and compilation of PTX
// disabled or too old for what the PTX asks.
constexpr int Rejections[] = {200, 209, 218, 221, 222, 223, 224};

void check(const DriverFunctions &api, int error, const char *call, const std::string &subject) {
    if (!error)
        return;
    const char *name = nullptr, *text = nullptr;
    api.cuGetErrorName(error, &name);
    api.cuGetErrorString(error, &text);
    std::string said = std::string(call) + " failed" + subject + ": ";
    said += (name ? name : "error " + std::to_string(error)) + std::string(text ? " (" : "") + (text ? text : "") +
            (text ? ")" : "") + ".";
    if (call == std::string("cuModuleLoadData"))
        for (int rejection : Rejections)
            if (error == rejection)
                throw ImageRejected(said);
    throw DriverError(said);
}

std::string on(int device) { return " on CUDA device " + std::to_string(device); }

// Makes a context the thread's own for as long as this lives, and then what was there before: another one, or none.
class Current {
public:
    Current(const DriverFunctions &api, void *context, int device) : api(api) {
        void *before = nullptr;
        check(api, api.cuCtxGetCurrent(&before), "cuCtxGetCurrent", on(device));
        if (before != context) {
            check(api, api.cuCtxPushCurrent_v2(context), "cuCtxPushCurrent", on(device));
            pushed = true;
        }
    }
    ~Current() {
        void *popped;
        if (pushed)
            api.cuCtxPopCurrent_v2(&popped);
    }

private:
    const DriverFunctions &api;
    bool pushed = false;
};

// Loading a module counts as unsafe while any stream is captured, unless the thread says that it knows what it does. It
// does: nothing that is loaded here waits for a stream.
class Relaxed {
public:
    Relaxed(const DriverFunctions &api, int device) : api(api) {
        check(api, api.cuThreadExchangeStreamCaptureMode(&mode), "cuThreadExchangeStreamCaptureMode", on(device));
    }
    ~Relaxed() { api.cuThreadExchangeStreamCaptureMode(&mode); }

private:
    const DriverFunctions &api;
    int mode = RelaxedCapture;
};

} // namespace

Driver::Driver(const std::string &path) : api(new DriverFunctions) {
    void *library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        const char *said = dlerror();
        std::string why = said ? said : path;
        if (why.find("No such file") != std::string::npos)
            why = path;
        throw DriverError("no CUDA driver library was found (" + why + ")");
    }
#define M3EM_LOOK_UP(name)                                                                                             \
    if (!(api->name = reinterpret_cast<decltype(api->name)>(dlsym(library, #name))))                                   \
        throw DriverError("the CUDA driver library " + path +                                                          \
                          " has no " #name ", so it is older than CUDA 10.1, the oldest that can be used");
    M3EM_LOOK_UP(cuInit)
    M3EM_LOOK_UP(cuGetErrorName)
    M3EM_LOOK_UP(cuGetErrorString)
    M3EM_LOOK_UP(cuDeviceGetCount)
    M3EM_LOOK_UP(cuDeviceGet)
    M3EM_LOOK_UP(cuDeviceGetAttribute)
    M3EM_LOOK_UP(cuDevicePrimaryCtxRetain)
    M3EM_LOOK_UP(cuCtxGetCurrent)
    M3EM_LOOK_UP(cuCtxPushCurrent_v2)
    M3EM_LOOK_UP(cuCtxPopCurrent_v2)
    M3EM_LOOK_UP(cuThreadExchangeStreamCaptureMode)
    M3EM_LOOK_UP(cuModuleLoadData)
    M3EM_LOOK_UP(cuModuleGetFunction)
    M3EM_LOOK_UP(cuFuncSetAttribute)
    M3EM_LOOK_UP(cuLaunchKernel)
#undef M3EM_LOOK_UP
    api->cuFuncLoad = reinterpret_cast<decltype(api->cuFuncLoad)>(dlsym(library, "cuFuncLoad"));
}

Driver::~Driver() = default;

void Driver::check_process() const {
    if (process.load(std::memory_order_acquire) != getpid())
        throw DriverError("CUDA cannot be used in this process: it was forked from one that had used CUDA already "
                          "(start it with the multiprocessing method \"spawn\").");
}

void Driver::start() {
    if (process.load(std::memory_order_acquire))
        return check_process();
    const std::lock_guard<std::mutex> lock(mutex);
    if (process.load(std::memory_order_relaxed))
        return check_process();
    check(*api, api->cuInit(0), "cuInit", "");
    int count = 0;
    check(*api, api->cuDeviceGetCount(&count), "cuDeviceGetCount", "");
    std::vector<Device> found(static_cast<size_t>(count));
    for (int i = 0; i < count; ++i) {
        Device &each = found[static_cast<size_t>(i)];
        int major = 0, minor = 0;
        const auto ask = [&](int attribute, int &value) {
            check(*api, api->cuDeviceGetAttribute(&value, attribute, each.handle), "cuDeviceGetAttribute", on(i));
        };
        check(*api, api->cuDeviceGet(&each.handle, i), "cuDeviceGet", on(i));
        ask(ComputeCapabilityMajor, major);
        ask(ComputeCapabilityMinor, minor);
        ask(MaxSharedMemoryOptin, each.shared_memory);
        each.capability = 10 * major + minor;
    }
    devices = std::move(found);
    process.store(getpid(), std::memory_order_release);
}

Driver::Device &Driver::device(int index) {
    start();
    if (index < 0 || index >= static_cast<int>(devices.size()))
        throw DriverError("there is no CUDA device " + std::to_string(index) + "; the driver has " +
                          std::to_string(devices.size()) + ".");
    return devices[static_cast<size_t>(index)];
}

int Driver::device_count() {
    start();
    return static_cast<int>(devices.size());
}
int Driver::capability(int index) { return device(index).capability; }
int Driver::shared_memory(int index) { return device(index).shared_memory; }

void *Driver::context(int index) {
    Device &of = device(index);
    const std::lock_guard<std::mutex> lock(mutex);
    if (!of.context) {
        const Relaxed relaxed(*api, index);
        check(*api, api->cuDevicePrimaryCtxRetain(&of.context, of.handle), "cuDevicePrimaryCtxRetain", on(index));
    }
    return of.context;
}

Module::Module(std::shared_ptr<Driver> of, int device, const std::string &image)
    : driver(std::move(of)), index(device), context(driver->context(device)),
      shared_memory(driver->shared_memory(device)) {
    const DriverFunctions &api = *driver->api;
    const Current current(api, context, index);
    const Relaxed relaxed(api, index);
    check(api, api.cuModuleLoadData(&module, image.c_str()), "cuModuleLoadData", on(index));
}

// Before the first launch of a kernel, and before the first that needs more shared memory than is given unasked.
void Module::prepare(const Launch &launch, Function &function) {
    const DriverFunctions &api = *driver->api;
    const std::lock_guard<std::mutex> lock(mutex);
    const Relaxed relaxed(api, index);
    const KernelName &k = launch.kernel;
    const std::string name = std::string(k.op) + "_" + k.stage + "_" + k.dtype + "_" + k.form;
    void *handle = function.handle.load(std::memory_order_relaxed);
    if (!handle) {
        const std::string subject = " for " + name + on(index);
        check(api, api.cuModuleGetFunction(&handle, module, name.c_str()), "cuModuleGetFunction", subject);
    }
    if (launch.shared > UnaskedShared && !function.large.load(std::memory_order_relaxed)) {
        // All that the card has, and once: a limit alone takes nothing.
        const int error = api.cuFuncSetAttribute(handle, MaxDynamicSharedSize, shared_memory);
        check(api, error, "cuFuncSetAttribute", " for " + name + on(index));
        function.large.store(true, std::memory_order_release);
    }
    // Modules are loaded lazily since CUDA 12.2: the code of a kernel would come to the card in its first launch, which
    // may be captured, and may then wait for all other work.
    if (api.cuFuncLoad && !function.handle.load(std::memory_order_relaxed))
        check(api, api.cuFuncLoad(handle), "cuFuncLoad", " for " + name + on(index));
    function.handle.store(handle, std::memory_order_release);
}

void Module::launch(const Launch &launch) {
    if (launch.blocks == 0)
        return;
    driver->check_process();
    const DriverFunctions &api = *driver->api;
    if (launch.blocks > INT_MAX)
        throw DriverError("a grid of " + std::to_string(launch.blocks) + " blocks is larger than CUDA allows.");
    const Current current(api, context, index);
    Function &function = functions.at(static_cast<size_t>(launch.kernel.slot));
    void *handle = function.handle.load(std::memory_order_acquire);
    if (!handle || (launch.shared > UnaskedShared && !function.large.load(std::memory_order_acquire))) {
        prepare(launch, function);
        handle = function.handle.load(std::memory_order_acquire);
    }
    void *arguments[] = {const_cast<void *>(launch.arguments)};
    const int error =
        api.cuLaunchKernel(handle, static_cast<unsigned>(launch.blocks), 1, 1, static_cast<unsigned>(launch.threads), 1,
                           1, static_cast<unsigned>(launch.shared), launch.stream, arguments, nullptr);
    if (error) {
        const KernelName &k = launch.kernel;
        const std::string name = std::string(k.op) + "_" + k.stage + "_" + k.dtype + "_" + k.form;
        check(api, error, "cuLaunchKernel", " for " + name + on(index));
    }
}

} // namespace m3em
