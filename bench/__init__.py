"""Benchmarks of the operators against their peers: `python -m bench`, or `pytest bench`."""
