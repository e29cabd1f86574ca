"""Calibration: run the full-precision model on prompts, measure what its layers see, and train the policy."""

from qlip_export.calibrate.ranges import measure_ranges

__all__ = ["measure_ranges"]
