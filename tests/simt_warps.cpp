// What kernels do within a warp, for the standalone program of csrc/simt: shuffles, votes and __syncwarp, against
// loops; and copies that are waited for later.
#include "simt/standalone.h"

#include "cuda/async.cuh"

#include <algorithm>

namespace {

using namespace standalone;

constexpr int Threads = 80, Blocks = 2, Warps = 3; // the last warp is half full
constexpr unsigned Whole = 0xffffffff;

struct Arguments {
    const float *x;
    float *total, *scan, *neighbour, *copied;
    double *mixed;
    unsigned *votes;
};

void kernel(const Arguments &g) {
    M3EM_SHARED(memory);
    float *copies = reinterpret_cast<float *>(memory), *parts = copies + Threads, *swap = parts + Warps;
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, all = blockIdx.x * Threads + tid;
    const unsigned present = warp < 2 ? Whole : 0xffff;
    const float value = g.x[all];
    // The numbers of the block, which others than those who copy them read.
    if (tid < Threads / 4)
        m3em::copy_pack(copies + 4 * tid, g.x + blockIdx.x * Threads + 4 * tid);
    // The sum of a block: of every warp, then of those.
    float sum = value;
    const int lanes = warp < 2 ? 32 : 16;
    for (int step = lanes / 2; step; step /= 2)
        sum += __shfl_down_sync(present, sum, step, lanes);
    if (lane == 0)
        parts[warp] = sum;
    m3em::await_copies();
    __syncthreads();
    g.copied[all] = copies[Threads - 1 - tid];
    float total = 0;
    for (int i = 0; i < Warps; ++i)
        total += parts[i];
    g.total[all] = total;
    // Sums up to every lane in groups of eight.
    float scan = value;
    for (int step = 1; step < 8; step *= 2) {
        const float before = __shfl_up_sync(present, scan, step, 8);
        scan += lane % 8 >= step ? before : 0;
    }
    g.scan[all] = scan;
    // Another lane's number by way of shared memory.
    swap[tid] = value;
    __syncwarp(present);
    g.neighbour[all] = swap[tid ^ 1];
    // Halves of a warp on their own, with numbers of eight bytes.
    const unsigned half = lane < 16 ? 0xffff : 0xffff0000;
    double mixed = __shfl_xor_sync(half, double(value), 3);
    mixed += 2 * __shfl_sync(half, double(value), 2, 16);
    g.mixed[all] = mixed;
    unsigned votes = __ballot_sync(present, value > 0);
    votes += __any_sync(present, value > 2) + __all_sync(present, value > -2);
    g.votes[all] = votes;
}

Finding run(simt::Order order) {
    constexpr size_t count = Threads * Blocks;
    Buffer<float> x(count), total(count), scan(count), neighbour(count), copied(count);
    Buffer<double> mixed(count);
    Buffer<unsigned> votes(count);
    Draw draw;
    for (size_t i = 0; i < count; ++i)
        x[i] = float(draw());
    const Arguments given = {x.data(),      total.data(), scan.data(), neighbour.data(),
                             copied.data(), mixed.data(), votes.data()};
    const auto enter = [](const void *arguments) { kernel(*static_cast<const Arguments *>(arguments)); };
    if (const char *error = simt::launch(enter, &given, Blocks, Threads, (Warps + 2 * Threads) * sizeof(float), order))
        return error;
    std::vector<double> found, wanted;
    for (int block = 0; block < Blocks; ++block)
        for (int tid = 0; tid < Threads; ++tid) {
            const auto at = [&](int other) { return double(x[size_t(block * Threads + other)]); };
            const int warp = tid / 32 * 32, lane = tid % 32, stop = std::min(warp + 32, Threads);
            double sum = 0, before = 0;
            unsigned positive = 0;
            for (int other = 0; other < Threads; ++other)
                sum += at(other);
            for (int other = tid / 8 * 8; other <= tid; ++other)
                before += at(other);
            for (int other = warp; other < stop; ++other)
                positive |= at(other) > 0 ? 1u << (other - warp) : 0;
            const double both = at(warp + (lane ^ 3)) + 2 * at(tid / 16 * 16 + 2);
            const size_t here = size_t(block * Threads + tid);
            found.insert(found.end(), {total[here], scan[here], neighbour[here], mixed[here], copied[here]});
            wanted.insert(wanted.end(), {sum, before, at(tid ^ 1), both, at(Threads - 1 - tid)});
            if (votes[here] != positive + 1)
                return "votes are wrong";
        }
    return compare("number", found, wanted, 1e-6);
}

const Op op = {"warps", [](const Check &check) { check("sums, scans, neighbours, votes and copies", run); }};

} // namespace
