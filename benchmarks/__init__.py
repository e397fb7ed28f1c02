"""Benchmarks against peers: `python -m benchmarks.<name>` runs one, `make bench` runs all of them."""
