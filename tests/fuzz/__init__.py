"""What `tests/test_fuzz_operators.py` draws, and formulas of every operator that share no line with the package."""
