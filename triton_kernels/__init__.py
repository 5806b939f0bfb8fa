"""The ground floor: storage formats and the kernels that run them. Imports nothing of the rest of halfweight."""
