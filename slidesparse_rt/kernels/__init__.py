"""Kernels in CUDA C++: which there are, compiling them with NVRTC, loading and launching them."""
