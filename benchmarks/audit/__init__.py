"""What the GPU kernels do, counted in their PTX: a prediction for machines without a GPU.

`ptx_interpreter` runs what nvcc and Triton made of the kernels on the CPU, and tells how often each instruction was run
and what it asked of memory. `build` compiles the library that holds nvcc's, `count` runs ops on either in a process of
its own, `result` compares with the bytes by formula of `benchmarks.cases`, `pipes` sorts instructions by the parts of a
multiprocessor, `roofline` tells how long each part takes at least, and `occupancy` how many warps a multiprocessor
holds. Nothing here measures time.
"""
