"""Asking a trained model from Python: `load_calibrated` and what it answers."""
