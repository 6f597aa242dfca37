"""Ways to compute a step that pay on a GPU."""
