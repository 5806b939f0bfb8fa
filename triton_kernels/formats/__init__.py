"""Storage formats: each module is one layout, its docstring the specification, `pack` and `unpack` inverses."""


class FormatError(ValueError):
    """Tensors that do not form a valid artifact of their format: wrong shape, dtype, or metadata."""
