"""Estimators of the confidence in a model's answer: stated, expected, likelihood, P(True), self-consistency; recalibration."""
