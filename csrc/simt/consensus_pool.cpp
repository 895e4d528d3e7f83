#include "simt/kernels.h"

#include "cuda/consensus_pool.cu"
