"""The operators: fake kernels, autograd formulas, autocast rules and public functions, one file per family."""
