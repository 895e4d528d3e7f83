"""A block of a CUDA kernel, run from its PTX on the CPU, and a count of what it does: see :mod:`bench.cuda_work`."""
