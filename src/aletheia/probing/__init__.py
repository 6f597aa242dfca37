"""Scores: how strongly the task's gradient acts on each layer, from a few forward and backward passes."""
