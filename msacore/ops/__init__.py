"""The operators: fake kernels, autograd formulas, autocast rules and public functions, a file per family."""
