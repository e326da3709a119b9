"""What is computed and not measured: floors of kernels, operations, steps on many GPUs."""
