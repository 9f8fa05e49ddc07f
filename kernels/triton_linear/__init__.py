"""Linear attention in Triton kernels, for CUDA devices: one operator in stages."""
