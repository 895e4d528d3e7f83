// A block, its threads and what they wait with: fibers, or with M3EM_SIMT_THREADS threads of the host.
#pragma once

#include "simt/simt.h"

#include <atomic>
#include <memory>
#include <vector>
#ifdef M3EM_SIMT_THREADS
#include <condition_variable>
#include <mutex>
#else
#include <ucontext.h>
#endif

namespace simt {
namespace {

constexpr int Lanes = 32;
constexpr int Votes = -1, Orders = -2; // in the place of the lane that is read

#ifdef M3EM_SIMT_THREADS

struct Stopped {}; // ends a thread of a block that has failed

#ifdef __has_feature
#if __has_feature(thread_sanitizer)
#define __SANITIZE_THREAD__ 1 // as gcc says it
#endif
#endif
#ifdef __SANITIZE_THREAD__
extern "C" void AnnotateIgnoreReadsBegin(const char *, int), AnnotateIgnoreReadsEnd(const char *, int);
extern "C" void AnnotateIgnoreWritesBegin(const char *, int), AnnotateIgnoreWritesEnd(const char *, int);
extern "C" void AnnotateIgnoreSyncBegin(const char *, int), AnnotateIgnoreSyncEnd(const char *, int);
extern "C" void __tsan_acquire(void *), __tsan_release(void *);
#define M3EM_TSAN(call) call
#else
#define M3EM_TSAN(call) (void)0
#endif

// ThreadSanitizer is to see what the kernel orders and nothing else. A lock that one thread has left and another one
// takes next would hide most races, so neither locks nor what they protect are shown to it; `leave_for` and `take_over`
// say who waited for whom.
struct Unseen {
    Unseen() { M3EM_TSAN((AnnotateIgnoreReadsBegin("", 0), AnnotateIgnoreWritesBegin("", 0))); }
    ~Unseen() { M3EM_TSAN((AnnotateIgnoreWritesEnd("", 0), AnnotateIgnoreReadsEnd("", 0))); }
};
struct Unordered {
    Unordered() { M3EM_TSAN(AnnotateIgnoreSyncBegin("", 0)); }
    ~Unordered() { M3EM_TSAN(AnnotateIgnoreSyncEnd("", 0)); }
};
inline void leave_for(char &next) { M3EM_TSAN(__tsan_release(&next)), (void)next; }
inline void take_over(char &from) { M3EM_TSAN(__tsan_acquire(&from)), (void)from; }

struct Monitor {
    std::mutex mutex;
    std::condition_variable changed;
    void wake() { changed.notify_all(); }
};

class Lock {
public:
    explicit Lock(Monitor &monitor) : monitor(monitor), lock(monitor.mutex, std::defer_lock) {
        Unordered unordered;
        lock.lock();
    }
    ~Lock() { unlock(); }
    void unlock() {
        Unordered unordered;
        if (lock.owns_lock())
            lock.unlock();
    }
    template <class Condition>
    void wait(Condition met) {
        Unordered unordered;
        monitor.changed.wait(lock, met);
    }

private:
    Monitor &monitor;
    std::unique_lock<std::mutex> lock;
};

#else

struct Unseen {
    Unseen() {}
};
struct Unordered {
    Unordered() {}
};
struct Monitor {
    void wake() {}
};
struct Lock {
    explicit Lock(Monitor &) {}
    void unlock() {}
};
inline void leave_for(char &) {}
inline void take_over(char &) {}

#endif

struct Block;

struct Copy {
    void *to;
    const void *from;
    size_t bytes;
};

struct Lane {
    Index index;
    Block *block;
    bool done, in_warp, at_barrier; // the last under the block's lock, the others under the warp's
    Place place;                    // where it waits
    unsigned mask;
    int source; // lane that it reads, or Votes
    uint64_t value, result;
    std::vector<Copy> copies; // not waited for yet
    char left, came; // stand for what a thread has done before it waits, and for what it may rely on afterwards
    unsigned number() const { return index.x % Lanes; }
    unsigned warp() const { return index.x / Lanes; }
#ifndef M3EM_SIMT_THREADS
    ucontext_t context;
    std::unique_ptr<char[]> stack;
#endif
};

struct Block {
    void (*kernel)(const void *);
    const void *arguments;
    Index index;
    std::vector<Lane> lanes;
    std::vector<int> order;
    std::unique_ptr<unsigned char[]> shared;
    Monitor barrier;
    std::unique_ptr<Monitor[]> warps; // so that one does not wake the others
    Place place;                      // of the barrier where the first one waits
    size_t arrived;
    bool mixed;               // another one waits at another barrier
    std::atomic<size_t> idle; // threads that wait or have left
    std::atomic<bool> failed;
    Monitor saying;
    char message[1024];
#ifndef M3EM_SIMT_THREADS
    ucontext_t scheduler;
#endif
};

} // namespace
} // namespace simt
