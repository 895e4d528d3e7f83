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

int channel_gate_most(); // gates of one call
// `out` and `grad_out` may be float32 beside a half x.
void channel_gate_forward(Module &module, void *stream, const ChannelGate &gate);
void channel_gate_backward(Module &module, void *stream, const ChannelGate &gate);

// Numbers of the accumulation type that the gradient of the map needs for every sample.
long long consensus_pool_workspace(Dtype dtype, const ConsensusPool &pool);
void consensus_pool_forward(Module &module, void *stream, const ConsensusPool &pool);
void consensus_pool_backward(Module &module, void *stream, const ConsensusPool &pool, void *workspace);

} // namespace cuda
} // namespace m3em
