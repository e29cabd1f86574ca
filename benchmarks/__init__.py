"""Speed, measured: `python -m benchmarks --help`."""
