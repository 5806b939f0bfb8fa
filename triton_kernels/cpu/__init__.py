"""Every op on machines without a GPU: LLVM kernels, compiled for the CPU at hand when they are first called.

One module per op: a layout (`prepare` from the file's tensors, `restore` back), and calls on what `prepare` returns.
`jit.available()` says whether the kernels run here. Nothing is compiled, and LLVM is not loaded, before the first call.
"""
