"""Image quality by activation bits: the numbers of docs/results.md."""
