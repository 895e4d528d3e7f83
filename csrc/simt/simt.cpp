#include "simt/simt.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <ucontext.h>
#include <vector>

namespace simt {
namespace {

constexpr size_t StackBytes = 128 << 10;

struct Fiber {
    ucontext_t context;
    Index index;
    std::unique_ptr<char[]> stack;
    bool done;
    const char *file; // of the barrier where it waits
    int line;
};

struct Launch {
    void (*kernel)(const void *);
    const void *arguments;
    ucontext_t scheduler;
    std::vector<Fiber> fibers;
    std::vector<int> order;
    std::unique_ptr<unsigned char[]> shared;
    Index block;
    Fiber *now;
};

// One launch at a time in a thread of the host.
thread_local Launch *running = nullptr;
thread_local char message[512];

void enter() {
    running->kernel(running->arguments);
    running->now->done = true;
}

// Every fiber to its next barrier or to its end. False where they did not all come to the same place.
bool step(Launch &launch) {
    for (int i : launch.order) {
        launch.now = &launch.fibers[i];
        swapcontext(&launch.scheduler, &launch.now->context);
    }
    const Fiber &first = launch.fibers[0];
    for (const Fiber &fiber : launch.fibers) {
        if (fiber.done == first.done && (fiber.done || (fiber.line == first.line && fiber.file == first.file)))
            continue;
        const auto where = [](const Fiber &f, char *text, size_t size) {
            f.done ? std::snprintf(text, size, "has left the kernel")
                   : std::snprintf(text, size, "waits at the barrier of %s:%d", f.file, f.line);
        };
        char one[200], other[200];
        where(first, one, sizeof(one)), where(fiber, other, sizeof(other));
        std::snprintf(message, sizeof(message), "divergent barrier in block %u: thread 0 %s, thread %u %s",
                      launch.block.x, one, fiber.index.x, other);
        return false;
    }
    return true;
}

} // namespace

const Index &thread() { return running->now->index; }
const Index &block() { return running->block; }
unsigned char *shared() { return running->shared.get(); }

void barrier(const char *file, int line) {
    Fiber &fiber = *running->now;
    fiber.file = file, fiber.line = line;
    swapcontext(&fiber.context, &running->scheduler);
}

const char *launch(void (*kernel)(const void *), const void *arguments, int64_t blocks, int threads, int64_t shared,
                   Order order) {
    Launch here;
    here.kernel = kernel, here.arguments = arguments;
    here.fibers.resize(size_t(threads));
    here.order.resize(size_t(threads));
    for (int i = 0; i < threads; ++i) {
        here.order[size_t(i)] = order == Order::reverse ? threads - 1 - i : i;
        here.fibers[size_t(i)].index = {unsigned(i), 0, 0};
        here.fibers[size_t(i)].stack.reset(new char[StackBytes]);
    }
    if (order == Order::shuffled)
        std::shuffle(here.order.begin(), here.order.end(), std::mt19937(7));
    Launch *const before = running;
    running = &here;
    const char *error = nullptr;
    for (here.block = {0, 0, 0}; here.block.x < blocks && !error; ++here.block.x) {
        here.shared.reset(new unsigned char[size_t(shared)]);
        std::memset(here.shared.get(), 0xff, size_t(shared));
        for (Fiber &fiber : here.fibers) {
            fiber.done = false;
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = fiber.stack.get();
            fiber.context.uc_stack.ss_size = StackBytes;
            fiber.context.uc_link = &here.scheduler;
            makecontext(&fiber.context, enter, 0);
        }
        while (!error && !here.fibers[0].done)
            error = step(here) ? nullptr : message;
    }
    running = before;
    return error;
}

} // namespace simt
