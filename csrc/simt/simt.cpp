// What threads of a block do to each other is the same for both kinds of thread: whoever comes to a point of waiting
// says so, releases everybody who is then complete, and waits. When nobody runs any more and not all have left, the
// states of all threads say what is wrong; so the sentence does not depend on who came first.
#include "simt/block.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <random>
#ifdef M3EM_SIMT_THREADS
#include <thread>
#endif

namespace simt {
namespace {

thread_local Lane *now = nullptr;
thread_local char last_message[1024];

bool same(const Place &one, const Place &other) {
    return one.line == other.line && one.number == other.number && !std::strcmp(one.file, other.file);
}

// The first one to complain is heard, and nobody goes on.
[[noreturn]] __attribute__((format(printf, 2, 3))) void fail(Block &block, const char *format, ...) {
    const Unseen unseen;
    {
        Lock lock(block.saying);
        if (!block.failed) {
            va_list values;
            va_start(values, format);
            std::vsnprintf(block.message, sizeof(block.message), format, values);
            va_end(values);
        }
        block.failed = true;
    }
#ifdef M3EM_SIMT_THREADS
    // Through every lock once, so that nobody is just about to wait.
    for (size_t i = 0; i <= (block.lanes.size() - 1) / Lanes + 1; ++i) {
        Monitor &monitor = i ? block.warps[i - 1] : block.barrier;
        {
            Lock lock(monitor);
        }
        monitor.wake();
    }
    throw Stopped();
#else
    for (;;) // the scheduler does not come back
        swapcontext(&now->context, &block.scheduler);
#endif
}

struct Text {
    char at[360];
};

Text state_of(const Lane &lane) {
    Text text;
    const auto print = [&](const char *format, auto... values) {
        std::snprintf(text.at, sizeof(text.at), format, values...);
    };
    if (lane.done)
        std::snprintf(text.at, sizeof(text.at), "has left the kernel");
    else if (lane.at_barrier)
        print("waits at the barrier of %s:%d", lane.place.file, lane.place.line);
    else
        print("waits at %s:%d with the mask 0x%x", lane.place.file, lane.place.line, lane.mask);
    return text;
}

// Nobody runs, and no lock is held: either all have left, or this is how they wait for each other in vain.
void judge(Block &block) {
    const std::vector<Lane> &lanes = block.lanes;
    if (std::all_of(lanes.begin(), lanes.end(), [](const Lane &lane) { return lane.done; }))
        return;
    for (const Lane &lane : lanes) {
        if (!lane.in_warp)
            continue;
        for (const Lane &other : lanes) {
            const bool waited_for = other.warp() == lane.warp() && lane.mask >> other.number() & 1 && !other.done;
            if (!waited_for || (other.in_warp && other.mask == lane.mask && same(other.place, lane.place)))
                continue;
            fail(block, "lanes that differ in block %u: lane %u of warp %u %s, lane %u %s", block.index.x,
                 lane.number(), lane.warp(), state_of(lane).at, other.number(), state_of(other).at);
        }
    }
    const Lane &first = lanes[0];
    for (const Lane &lane : lanes) {
        if (lane.done != first.done || (!lane.done && !same(lane.place, first.place)))
            fail(block, "divergent barrier in block %u: thread 0 %s, thread %u %s%s", block.index.x, state_of(first).at,
                 lane.index.x, state_of(lane).at,
                 !lane.done && !first.done && lane.place.line == first.place.line ? ", another one on that line" : "");
    }
    fail(block, "block %u stands still", block.index.x);
}

// Runs no longer. True for the last one.
bool rests(Block &block) {
    const Unordered unordered;
    return block.idle.fetch_add(1) + 1 == block.lanes.size();
}
void run_again(Block &block, size_t released) {
    const Unordered unordered;
    block.idle.fetch_sub(released);
}

// Until `waiting` is false, which is for whoever releases this lane to say.
void wait(Lane &lane, Lock &lock, const bool &waiting) {
    Block &block = *lane.block;
    if (waiting && rests(block)) {
        lock.unlock();
        judge(block);
    }
#ifdef M3EM_SIMT_THREADS
    lock.wait([&] { return !waiting || block.failed; });
    if (block.failed)
        throw Stopped();
#else
    (void)waiting;
    swapcontext(&lane.context, &block.scheduler); // even if released already: the others' turn
#endif
}

// Releases the lanes of `mask` if all that have not left wait with that mask at one place. `self` has not been counted
// among the idle. Gives the lane that reads what is not there, or null.
const Lane *settle(Block &block, unsigned warp, unsigned mask, const Lane *self) {
    Lane *const first = &block.lanes[warp * Lanes];
    const unsigned count = std::min<unsigned>(Lanes, unsigned(block.lanes.size()) - warp * Lanes);
    const Lane *one = nullptr;
    unsigned here = 0, votes = 0;
    for (unsigned i = 0; i < count; ++i) {
        const Lane &lane = first[i];
        if (!(mask >> i & 1) || lane.done)
            continue;
        if (!lane.in_warp || lane.mask != mask || (one && !same(lane.place, one->place)))
            return nullptr;
        one = &lane;
        here |= 1u << i, votes |= lane.value ? 1u << i : 0;
    }
    for (unsigned i = 0; i < count; ++i)
        if (here >> i & 1 && first[i].source >= 0 && !(here >> first[i].source & 1))
            return &first[i];
    size_t released = 0;
    for (unsigned i = 0; i < count; ++i) {
        Lane &lane = first[i];
        if (!(here >> i & 1))
            continue;
        lane.result = lane.source < 0 ? votes : first[lane.source].value;
        released += &lane != self;
        if (one->source == Orders)
            take_over(lane.left);
    }
    for (unsigned i = 0; i < count; ++i)
        if (here >> i & 1) {
            leave_for(first[i].came);
            first[i].in_warp = false;
        }
    run_again(block, released);
    block.warps[warp].wake();
    return nullptr;
}

[[noreturn]] void refuse_read(const Lane &lane) {
    const Block &block = *lane.block;
    const size_t source = lane.warp() * Lanes + size_t(lane.source);
    const char *reason = "which its mask does not name";
    if (lane.mask >> lane.source & 1)
        reason = source < block.lanes.size() ? "which has left the kernel" : "which the block does not have";
    fail(*lane.block, "shuffle at %s:%d in block %u: lane %u of warp %u reads lane %d, %s", lane.place.file,
         lane.place.line, block.index.x, lane.number(), lane.warp(), lane.source, reason);
}

uint64_t meet(const Place &place, unsigned mask, uint64_t value, int source) {
    const Unseen unseen;
    Lane &lane = *now;
    Block &block = *lane.block;
    if (!(mask >> lane.number() & 1))
        fail(block, "lane %u of warp %u in block %u comes to %s:%d with the mask 0x%x, which does not name it",
             lane.number(), lane.warp(), block.index.x, place.file, place.line, mask);
    Monitor &monitor = block.warps[lane.warp()];
    Lock lock(monitor);
    leave_for(lane.left);
    lane.place = place, lane.mask = mask, lane.value = value, lane.source = source;
    lane.in_warp = true;
    if (const Lane *wrong = settle(block, lane.warp(), mask, &lane)) {
        lock.unlock();
        refuse_read(*wrong);
    }
    wait(lane, lock, lane.in_warp);
    if (source == Orders)
        take_over(lane.came);
    return lane.result;
}

void leave(Lane &lane) {
    const Unseen unseen;
    Block &block = *lane.block;
    if (!lane.copies.empty())
        fail(block, "thread %u of block %u leaves the kernel with copies that it has not waited for", lane.index.x,
             block.index.x);
    const Lane *wrong = nullptr;
    {
        Lock lock(block.warps[lane.warp()]);
        lane.done = true;
        // Whoever waits may have waited for this one alone.
        const unsigned count = std::min<unsigned>(Lanes, unsigned(block.lanes.size()) - lane.warp() * Lanes);
        for (unsigned i = 0; i < count && !wrong; ++i)
            if (const Lane &other = block.lanes[lane.warp() * Lanes + i]; other.in_warp)
                wrong = settle(block, lane.warp(), other.mask, nullptr);
    }
    if (wrong)
        refuse_read(*wrong);
    if (rests(block))
        judge(block);
}

void run(Lane &lane) {
    now = &lane;
#ifdef M3EM_SIMT_THREADS
    try {
        lane.block->kernel(lane.block->arguments);
        leave(lane);
    } catch (const Stopped &) {
    }
#else
    lane.block->kernel(lane.block->arguments);
    leave(lane);
#endif
}

#ifdef M3EM_SIMT_THREADS

void run_block(Block &block) {
    std::vector<std::thread> threads;
    for (int i : block.order)
        threads.emplace_back([&block, i] { run(block.lanes[size_t(i)]); });
    for (std::thread &thread : threads)
        thread.join();
}

#else

constexpr size_t StackBytes = 128 << 10;

void enter() { run(*now); }

void run_block(Block &block) {
    for (Lane &lane : block.lanes) {
        if (!lane.stack)
            lane.stack.reset(new char[StackBytes]);
        getcontext(&lane.context);
        lane.context.uc_stack.ss_sp = lane.stack.get();
        lane.context.uc_stack.ss_size = StackBytes;
        lane.context.uc_link = &block.scheduler;
        makecontext(&lane.context, enter, 0);
    }
    for (bool ran = true; ran;) {
        ran = false;
        for (int i : block.order) {
            Lane &lane = block.lanes[size_t(i)];
            if (lane.done || lane.in_warp || lane.at_barrier)
                continue;
            ran = true;
            now = &lane;
            swapcontext(&block.scheduler, &lane.context);
            if (block.failed)
                return;
        }
    }
}

#endif

} // namespace

const Index &thread() { return now->index; }
const Index &block() { return now->block->index; }
unsigned char *shared() { return now->block->shared.get(); }

void barrier(const Place &place) {
    const Unseen unseen;
    Lane &lane = *now;
    Block &block = *lane.block;
    Lock lock(block.barrier);
    leave_for(lane.left);
    lane.place = place, lane.at_barrier = true;
    if (block.arrived++ == 0)
        block.place = place, block.mixed = false;
    block.mixed = block.mixed || !same(block.place, place);
    if (block.arrived == block.lanes.size() && !block.mixed) {
        for (Lane &other : block.lanes)
            take_over(other.left);
        for (Lane &other : block.lanes) {
            leave_for(other.came);
            other.at_barrier = false;
        }
        block.arrived = 0;
        run_again(block, block.lanes.size() - 1);
        block.barrier.wake();
    }
    wait(lane, lock, lane.at_barrier);
    take_over(lane.came);
}

void copy_later(void *to, const void *from, size_t bytes) {
    if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % bytes)
        fail(*now->block, "thread %u of block %u copies %d bytes between addresses that are no multiples of it",
             now->index.x, now->block->index.x, int(bytes));
    std::memset(to, 0xff, bytes);
    now->copies.push_back({to, from, bytes});
}

void await_copies() {
    for (const Copy &copy : now->copies)
        std::memcpy(copy.to, copy.from, copy.bytes);
    now->copies.clear();
}

void warp_barrier(const Place &place, unsigned mask) { meet(place, mask, 0, Orders); }

unsigned vote(const Place &place, unsigned mask, bool predicate) {
    return unsigned(meet(place, mask, predicate, Votes));
}

uint64_t shuffle_bits(const Place &place, Way way, unsigned mask, uint64_t bits, int other, int width) {
    if (width < 1 || width > Lanes || (width & (width - 1)))
        fail(*now->block, "shuffle at %s:%d in block %u: the width %d is no power of two up to 32", place.file,
             place.line, now->block->index.x, width);
    // Beyond its group of `width` lanes a lane reads itself.
    const int lane = int(now->number()), start = lane & ~(width - 1), stop = start + width;
    int source = lane;
    if (way == Way::from)
        source = start | (other & (width - 1));
    else if (way == Way::up)
        source = other >= 0 && lane - start >= other ? lane - other : lane;
    else if (way == Way::down)
        source = other >= 0 && stop - lane > other ? lane + other : lane;
    else
        source = ((lane ^ other) & (Lanes - 1)) < stop ? (lane ^ other) & (Lanes - 1) : lane;
    return meet(place, mask, bits, source);
}

const char *launch(void (*kernel)(const void *), const void *arguments, int64_t blocks, int threads, int64_t shared,
                   Order order) {
    Block block{};
    block.kernel = kernel, block.arguments = arguments;
    block.lanes = std::vector<Lane>(size_t(threads));
    for (int i = 0; i < threads; ++i)
        block.order.push_back(order == Order::reverse ? threads - 1 - i : i);
    if (order == Order::shuffled)
        std::shuffle(block.order.begin(), block.order.end(), std::mt19937(7));
    Lane *const before = now;
    for (; block.index.x < blocks && !block.failed; ++block.index.x) {
        block.shared.reset(new unsigned char[size_t(shared)]);
        std::memset(block.shared.get(), 0xff, size_t(shared));
        block.warps.reset(new Monitor[(size_t(threads) + Lanes - 1) / Lanes]);
        block.arrived = 0, block.idle = 0;
        for (int i = 0; i < threads; ++i) {
            Lane &lane = block.lanes[size_t(i)];
            lane.index = {unsigned(i), 0, 0};
            lane.block = &block;
            lane.done = lane.in_warp = lane.at_barrier = false;
            lane.copies.clear();
        }
        run_block(block);
    }
    now = before;
    if (!block.failed)
        return nullptr;
    std::snprintf(last_message, sizeof(last_message), "%s", block.message);
    return last_message;
}

} // namespace simt
