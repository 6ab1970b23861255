"""Device functions that the attention kernels are composed of, one idea a file."""
