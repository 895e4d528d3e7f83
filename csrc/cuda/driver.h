// Loads compiled kernels and launches them through the CUDA driver API: without CUDA's headers, its runtime or torch.
//
// Nothing here allocates memory on a card; that is torch's, in Python.
#pragma once

#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

namespace m3em {

// What the driver library answered, in a sentence.
struct DriverError : std::runtime_error {
    using std::runtime_error::runtime_error;
};
// An image that the card, or its driver, cannot run. Another one may do.
struct ImageRejected : DriverError {
    using DriverError::DriverError;
};

struct DriverFunctions; // the driver API, as far as it is used here

// One driver library.
class Driver {
public:
    // Looks the library up and calls nothing in it, so a process that only asks whether there is one may still be
    // forked. `path` is a file, or a name for the system's loader.
    explicit Driver(const std::string &path);
    ~Driver();
    Driver(const Driver &) = delete;
    Driver &operator=(const Driver &) = delete;

    int device_count();
    int capability(int device);    // 70 for 7.0
    int shared_memory(int device); // the most bytes that a block may ask for

private:
    friend class Module;
    struct Device {
        void *context = nullptr; // the primary one, which torch uses as well; retained for good
        int handle = 0, capability = 0, shared_memory = 0;
    };

    void start();
    void check_process() const;
    Device &device(int index);
    void *context(int index);

    std::unique_ptr<DriverFunctions> api;
    std::mutex mutex;
    std::atomic<int> process{0}; // that called cuInit
    std::vector<Device> devices;
};

// A kernel's name is <op>_<stage>_<dtype>_<form>. Modules keep what they have looked up by `slot`.
struct KernelName {
    const char *op, *stage, *dtype, *form;
    int slot;
};

struct Launch {
    KernelName kernel;
    long long blocks;
    int threads;
    long long shared; // bytes a block
    void *stream;
    const void *arguments; // the one argument of the kernel
};

// One image on one device. May be used by several threads at once.
class Module {
public:
    static constexpr int Slots = 64;

    Module(std::shared_ptr<Driver> driver, int device, const std::string &image);

    // A grid of no blocks is no launch.
    void launch(const Launch &launch);

private:
    struct Function {
        std::atomic<void *> handle{nullptr};
        std::atomic<bool> large{false}; // may ask for more shared memory than every card gives unasked
    };
    void prepare(const Launch &launch, Function &function);

    const std::shared_ptr<Driver> driver;
    const int index;
    void *context = nullptr, *module = nullptr;
    int shared_memory = 0;
    std::mutex mutex;
    std::array<Function, Slots> functions;
};

} // namespace m3em
