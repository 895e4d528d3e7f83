#include "simt/kernels.h"

#include "cuda/channel_gate.cu"
