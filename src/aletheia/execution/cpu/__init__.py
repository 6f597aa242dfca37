"""Ways to compute a step that are faster on a CPU."""
