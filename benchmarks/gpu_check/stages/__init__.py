"""The stages, one a file; see `benchmarks.gpu_check`."""
