"""Training by a plan: phases, checkpoints, and the measurements of a run."""
