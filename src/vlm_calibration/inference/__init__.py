"""Inference in Python: `load_calibrated` and the `Answer` that a model returns."""
