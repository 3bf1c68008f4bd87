"""The operations in Triton kernels, for CUDA; only ``support.py`` imports without Triton."""
