"""What a model can do: the held-out loss, and code that it writes, run in a sandbox."""
