// A driver library without a card: as much of the CUDA driver API as csrc/cuda/driver.cpp uses, on the CPU.
//
// It refuses what a card would refuse (an image for another architecture, a launch without the right context, too large
// a block, more shared memory than was asked for, loading while a stream is captured) and writes down every call. The
// functions simt_... at the end are for tests.
#include "simt/errors.h"
#include "simt/kernels.h"

#include <atomic>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <sys/syscall.h>
#include <unistd.h>
#include <vector>

namespace simt {
namespace {

constexpr int UnaskedShared = 48 << 10;
enum Mode : int { Global = 0, ThreadLocal = 1, Relaxed = 2 };

struct Context {
    int device, retained;
};
struct Device {
    int capability, shared;
    Context context;
};
struct Loaded {
    Context *context;
};
struct Function {
    const Kernel *kernel;
    Context *context;
    int limit;   // of shared memory, in bytes
    bool loaded; // its code is on the card; else the first launch brings it there
};
struct Stream {
    Context *context;
    bool capturing;
    int mode;
    long thread;
    std::vector<std::function<int()>> recorded;
};

std::mutex mutex; // of all that follows
bool initialized = false;
std::deque<Device> devices;
std::deque<Loaded> modules;
std::deque<Function> functions;
std::deque<Stream> streams;
std::string written;
std::map<std::string, std::pair<int, int>> failures; // call -> error and how many calls go well before it
Order order = Order::forward;
std::atomic<int> slowness{0}; // microseconds that every call takes

thread_local std::vector<Context *> stack;
thread_local int capture_mode = Global;
thread_local char failure[512] = "unspecified launch failure"; // of the last launch

long thread_id() { return syscall(SYS_gettid); }
Context *current() { return stack.empty() ? nullptr : stack.back(); }

template <class T>
T *handle(std::deque<T> &all, void *given) {
    for (T &each : all)
        if (&each == given)
            return &each;
    return nullptr;
}

// Every call goes through here: what it does, unless a test wants it to fail, and a line of what came of it. `body`
// runs under the mutex.
int call(const char *name, const std::string &subject, const std::function<int()> &body) {
    usleep(useconds_t(slowness.load()));
    const std::lock_guard<std::mutex> lock(mutex);
    int error = Success;
    const auto planned = failures.find(name);
    if (planned != failures.end() && planned->second.second-- == 0) {
        error = planned->second.first;
        failures.erase(planned);
    } else if (!initialized && std::string(name) != "cuInit") {
        error = NotInitialized;
    } else {
        error = body();
    }
    written += std::string(name) + "\t" + std::to_string(error) + "\t" + std::to_string(thread_id()) + "\t" +
               (current() ? std::to_string(current()->device) : "none") + "\t" + std::to_string(capture_mode) + "\t" +
               subject + "\n";
    return error;
}

// What loading is measured by: whether some capture forbids it.
bool forbidden() {
    for (const Stream &stream : streams) {
        if (!stream.capturing)
            continue;
        if (capture_mode == Global && stream.mode == Global)
            return true;
        if (capture_mode != Relaxed && stream.mode != Relaxed && stream.thread == thread_id())
            return true;
    }
    return false;
}

// The architecture of an image, as 70; below 0 for PTX, 0 for neither.
int architecture(const unsigned char *image) {
    if (std::memcmp(image, "\177ELF", 4) == 0) {
        uint32_t flags;
        std::memcpy(&flags, image + 48, 4);
        return image[8] >= 8 ? flags >> 8 & 0xff : flags & 0xff; // the place has changed with CUDA 12.8's newer cards
    }
    const char *text = reinterpret_cast<const char *>(image), *target = std::strstr(text, ".target sm_");
    return target ? -std::atoi(target + 11) : 0;
}

bool runs_on(int image, int card) {
    if (image < 0)
        return -image <= card;
    return image / 10 == card / 10 && image <= card;
}

} // namespace
} // namespace simt

using namespace simt;

#define M3EM_API extern "C" __attribute__((visibility("default")))

M3EM_API int cuInit(unsigned) {
    return call("cuInit", "", [] {
        if (devices.empty())
            return NoDevice;
        initialized = true;
        return Success;
    });
}

M3EM_API int cuGetErrorName(int error, const char **text) {
    const auto found = errors.find(error);
    *text = found == errors.end() ? nullptr : found->second.first;
    return found == errors.end() ? InvalidValue : Success;
}

M3EM_API int cuGetErrorString(int error, const char **text) {
    const auto found = errors.find(error);
    *text = error == LaunchFailed ? failure : found == errors.end() ? nullptr : found->second.second;
    return found == errors.end() ? InvalidValue : Success;
}

M3EM_API int cuDeviceGetCount(int *count) {
    return call("cuDeviceGetCount", "", [=] { return *count = int(devices.size()), Success; });
}

// A device's handle is not its number here, so that nobody takes one for the other.
M3EM_API int cuDeviceGet(int *device, int ordinal) {
    return call("cuDeviceGet", std::to_string(ordinal), [=] {
        if (ordinal < 0 || ordinal >= int(devices.size()))
            return InvalidDevice;
        *device = ordinal + 1000;
        return Success;
    });
}

M3EM_API int cuDeviceGetAttribute(int *value, int attribute, int device) {
    return call("cuDeviceGetAttribute", std::to_string(attribute), [=] {
        if (device < 1000 || device >= 1000 + int(devices.size()))
            return InvalidDevice;
        const Device &of = devices[size_t(device - 1000)];
        if (attribute != 75 && attribute != 76 && attribute != 97)
            return InvalidValue;
        *value = attribute == 75 ? of.capability / 10 : attribute == 76 ? of.capability % 10 : of.shared;
        return Success;
    });
}

M3EM_API int cuDevicePrimaryCtxRetain(void **context, int device) {
    return call("cuDevicePrimaryCtxRetain", std::to_string(device - 1000), [=] {
        if (device < 1000 || device >= 1000 + int(devices.size()))
            return InvalidDevice;
        if (forbidden()) // no documentation says that it is allowed
            return CaptureUnsupported;
        Context &of = devices[size_t(device - 1000)].context;
        of.device = device - 1000;
        ++of.retained;
        *context = &of;
        return Success;
    });
}

M3EM_API int cuCtxGetCurrent(void **context) {
    return call("cuCtxGetCurrent", "", [=] { return *context = current(), Success; });
}

M3EM_API int cuCtxPushCurrent_v2(void *context) {
    return call("cuCtxPushCurrent", "", [=] {
        for (Device &each : devices)
            if (&each.context == context && each.context.retained)
                return stack.push_back(&each.context), Success;
        return InvalidContext;
    });
}

M3EM_API int cuCtxPopCurrent_v2(void **context) {
    return call("cuCtxPopCurrent", "", [=] {
        if (stack.empty())
            return InvalidContext;
        *context = stack.back();
        stack.pop_back();
        return Success;
    });
}

M3EM_API int cuThreadExchangeStreamCaptureMode(int *mode) {
    return call("cuThreadExchangeStreamCaptureMode", std::to_string(*mode), [=] {
        if (*mode < Global || *mode > Relaxed)
            return InvalidValue;
        std::swap(*mode, capture_mode);
        return Success;
    });
}

M3EM_API int cuModuleLoadData(void **module, const void *image) {
    const int made_for = architecture(static_cast<const unsigned char *>(image));
    const std::string subject = (made_for < 0 ? "compute_" : "sm_") + std::to_string(std::abs(made_for));
    return call("cuModuleLoadData", subject, [=] {
        if (!current())
            return InvalidContext;
        if (forbidden())
            return CaptureUnsupported;
        if (!made_for)
            return InvalidImage;
        if (!runs_on(made_for, devices[size_t(current()->device)].capability))
            return NoBinaryForGpu;
        modules.push_back({current()});
        *module = &modules.back();
        return Success;
    });
}

M3EM_API int cuModuleGetFunction(void **function, void *module, const char *name) {
    return call("cuModuleGetFunction", name, [=] {
        const Loaded *of = handle(modules, module);
        if (!of || of->context != current())
            return InvalidHandle;
        if (forbidden())
            return CaptureUnsupported;
        const Kernel *kernel = find_kernel(name);
        if (!kernel)
            return NotFound;
        functions.push_back({kernel, of->context, UnaskedShared, false});
        *function = &functions.back();
        return Success;
    });
}

M3EM_API int cuFuncSetAttribute(void *function, int attribute, int value) {
    return call("cuFuncSetAttribute", std::to_string(attribute) + "=" + std::to_string(value), [=] {
        Function *of = handle(functions, function);
        if (!of || of->context != current())
            return InvalidHandle;
        if (forbidden())
            return CaptureUnsupported;
        if (attribute != 8 || value < 0 || value > devices[size_t(of->context->device)].shared)
            return InvalidValue;
        of->limit = value;
        return Success;
    });
}

M3EM_API int cuFuncLoad(void *function) {
    return call("cuFuncLoad", "", [=] {
        Function *of = handle(functions, function);
        if (!of || of->context != current())
            return InvalidHandle;
        if (forbidden())
            return CaptureUnsupported;
        return of->loaded = true, Success;
    });
}

M3EM_API int cuLaunchKernel(void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                            unsigned block_y, unsigned block_z, unsigned shared, void *stream, void **arguments,
                            void **extra) {
    std::function<int()> run; // a captured launch outlives its arguments, so it has a copy
    bool captured = false;
    const char *name = "?";
    {
        const std::lock_guard<std::mutex> lock(mutex);
        if (const Function *of = handle(functions, function))
            name = of->kernel->name;
    }
    char subject[256];
    std::snprintf(subject, sizeof(subject), "%s blocks=%u threads=%u shared=%u stream=%zu", name, grid_x, block_x,
                  shared, reinterpret_cast<size_t>(stream));
    const int error = call("cuLaunchKernel", subject, [&] {
        const Function *of = handle(functions, function);
        Stream *where = handle(streams, stream);
        if (!current())
            return InvalidContext;
        if (!of || of->context != current() || (stream && (!where || where->context != current())))
            return InvalidHandle;
        if (!grid_x || grid_x > 0x7fffffff || grid_y != 1 || grid_z != 1 || !block_x || block_y != 1 || block_z != 1)
            return InvalidValue;
        if (shared > unsigned(of->limit) || !arguments || extra)
            return InvalidValue;
        if (block_x > unsigned(of->kernel->threads))
            return LaunchOutOfResources;
        const Kernel *kernel = of->kernel;
        std::vector<std::max_align_t> copy(kernel->size / sizeof(std::max_align_t) + 1);
        std::memcpy(copy.data(), arguments[0], kernel->size);
        run = [=, how = order] {
            const char *wrong = simt::launch(kernel->run, copy.data(), grid_x, int(block_x), shared, how);
            if (wrong)
                std::snprintf(failure, sizeof(failure), "%s", wrong);
            return wrong ? LaunchFailed : Success;
        };
        captured = where && where->capturing;
        if (captured)
            where->recorded.push_back(run);
        return Success;
    });
    return error || captured ? error : run();
}

// ------------------------------------------------------------------------------------------------------- for tests

// As many devices, all of one compute capability and with as much shared memory for a block. Before cuInit.
M3EM_API void simt_devices(int count, int capability, int shared) {
    const std::lock_guard<std::mutex> lock(mutex);
    devices.clear();
    for (int i = 0; i < count; ++i)
        devices.push_back({capability, shared, {i, 0}});
}

M3EM_API void simt_order(int wanted) { order = static_cast<Order>(wanted); }

M3EM_API void simt_slow(int microseconds) { slowness = microseconds; }

// Lets a call fail with an error, after as many that do not.
M3EM_API void simt_fail(const char *name, int error, int after) {
    const std::lock_guard<std::mutex> lock(mutex);
    failures[name] = {error, after};
}

// One line a call: name, error, thread, device of the current context, capture mode, subject; and begins anew. The text
// is good until the next call.
M3EM_API const char *simt_log() {
    static std::string given;
    const std::lock_guard<std::mutex> lock(mutex);
    given.swap(written);
    written.clear();
    return given.c_str();
}

M3EM_API int simt_retained(int device) {
    const std::lock_guard<std::mutex> lock(mutex);
    return devices[size_t(device)].context.retained;
}

M3EM_API void *simt_stream(int device) {
    const std::lock_guard<std::mutex> lock(mutex);
    streams.push_back({&devices[size_t(device)].context, false, Global, 0, {}});
    return &streams.back();
}

M3EM_API void simt_capture(void *stream, int mode) {
    const std::lock_guard<std::mutex> lock(mutex);
    Stream &of = *handle(streams, stream);
    of.capturing = true, of.mode = mode, of.thread = thread_id();
}

// How many launches were captured.
M3EM_API int simt_end_capture(void *stream) {
    const std::lock_guard<std::mutex> lock(mutex);
    Stream &of = *handle(streams, stream);
    of.capturing = false;
    return int(of.recorded.size());
}

// Runs what was captured.
M3EM_API int simt_replay(void *stream) {
    for (const auto &each : static_cast<Stream *>(stream)->recorded)
        if (const int error = each())
            return error;
    return Success;
}
