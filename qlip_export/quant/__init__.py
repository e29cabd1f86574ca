"""Numbers on a grid: 4-bit weights and activation ranges."""
