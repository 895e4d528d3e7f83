#include "simt/kernels.h"

#include "cuda/consensus_map.cu"
