"""Running GPU kernels without a GPU: Triton's interpreter, an emulator of inline PTX, and a memory meter on top."""
