"""What a model can do: benchmarks, the held-out loss, and code that it writes, run in a sandbox."""
