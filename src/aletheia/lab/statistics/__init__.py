"""Intervals, tests and margins for the figures of a report: plain numbers in, plain numbers out. Torch-free."""
