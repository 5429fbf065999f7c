"""POPE and AMBER: reading their official files, and their scoring rules. Needs neither a model nor torch."""
