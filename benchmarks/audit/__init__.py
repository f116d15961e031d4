"""Instructions and memory accesses of the GPU kernels, counted in their PTX: a prediction for machines without a GPU.

`ptx_interpreter` runs nvcc's and Triton's PTX on the CPU. `cases` lists the audited calls, `build` compiles the library
with nvcc's PTX, `count` counts in another process, `result` compares with the bytes by formula of
`benchmarks.cases`, `roofline` predicts times and occupancy, and `table` shows all that. Nothing here measures time.
"""
