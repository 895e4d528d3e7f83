// The ops on a card: what csrc/cpu/kernels.h describes, with addresses of the card, on a stream.
#pragma once

#include "cpu/kernels.h"
#include "cuda/driver.h"

namespace m3em {
namespace cuda {

// What `consensus_map` needs: numbers of the accumulation type for every sample, and bytes of shared memory.
struct ConsensusMapNeeds {
    long long workspace, stats, shared;
};
ConsensusMapNeeds consensus_map_needs(Dtype dtype, const ConsensusMap &map);

// `partial` is the workspace. `out` and `grad_out` may be float32 beside half maps.
void consensus_map_forward(Module &module, void *stream, const ConsensusMap &map, void *partial);
void consensus_map_backward(Module &module, void *stream, const ConsensusMap &map);

} // namespace cuda
} // namespace m3em
