"""Prompts, stated confidence and grading of answers, as pure functions of strings."""
