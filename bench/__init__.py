"""Measurements against a rival in the same run; no part of the package or of the tests: `python -m bench.search`."""
