"""The ops as Triton kernels, for CUDA and ROCm devices."""
