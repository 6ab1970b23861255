"""What compilers make of kernels, Triton's and ours in CUDA C++: read from the binary, held to a budget."""
