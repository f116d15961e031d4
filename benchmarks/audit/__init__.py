"""What the GPU kernels ask of memory, emulated and interpreted: a prediction for machines without a GPU.

The kernels of `csrc/cuda` run on the CPU (`tests/cuda_emulator`), compiled so that every access to memory is counted as
a GPU would make it: a warp at a time, in sectors of 32 bytes. `build` compiles that library, `count` runs ops on it in
a process of its own, `result` compares the counts with the bytes by formula of `benchmarks.cases`, and `occupancy`
tells how many warps a multiprocessor holds. `triton` counts what the Triton kernels load, store and multiply, in
Triton's interpreter. Nothing here measures time.
"""
