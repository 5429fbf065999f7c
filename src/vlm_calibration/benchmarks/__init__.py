"""POPE and AMBER: their official files, answers to them, and their scoring rules. Neither a model nor torch is needed."""
