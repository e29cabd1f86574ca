"""Calibration: run the full-precision model on prompts, measure what its layers see, and train the policy."""

from qlip_export.calibrate.ranges import GENERIC_PROMPTS, measure_ranges, read_prompts

__all__ = ["GENERIC_PROMPTS", "measure_ranges", "read_prompts"]
