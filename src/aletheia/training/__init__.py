"""Adapters from a plan, the training loop, and the run it leaves behind."""
