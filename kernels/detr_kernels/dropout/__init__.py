"""Random numbers of dropout: Philox inside Triton kernels, PCG64 on a CPU."""
