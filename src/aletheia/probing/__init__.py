"""Scores: which layers the task pulls on, from a few forward and backward passes."""
