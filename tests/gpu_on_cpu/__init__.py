"""GPU code run on the CPU: the PTX of Triton and nvcc interpreted, CUDA sources compiled by g++.

Every GPU thread is a fiber. Threads and blocks run in random order, shared memory starts out as
NaN, and what a GPU would not forgive stops the run with a message that names kernel, block, thread
and line: accesses out of bounds or misaligned, races in shared memory, barriers that diverge, wrong
lane masks. What is read and written in global memory is counted.

Approximate instructions (``ex2.approx``) are as exact as the C library, matrix products are rounded
once: there the last bits differ from a GPU's. Not known are wgmma, TMA, mbarriers, clusters, named
barriers, calls and textures; an instruction that is not known is an error that names it. Blocks run
one after the other, so a block that waits for a later one never ends. Nothing is said about speed.
"""
