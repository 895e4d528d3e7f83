"""The five ops: channel gating and cross-modal consensus, for any PyTorch code.

Shapes: N samples (clips x frames), C channels, D latent channels, G gates, spatial size H x W.
"""

from m3em_fast.ops.channel_gate import channel_gate
from m3em_fast.ops.consensus_map import consensus_map
from m3em_fast.ops.consensus_pool import consensus_pool
from m3em_fast.ops.gated_consensus_pool import gated_consensus_pool
from m3em_fast.ops.gated_projection import gated_projection

__all__ = ["channel_gate", "consensus_map", "consensus_pool", "gated_consensus_pool", "gated_projection"]
