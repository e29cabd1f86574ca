"""Data, training, evaluation and export of the embedded emoji model."""
