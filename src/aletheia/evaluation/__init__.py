"""What a model can do: the held-out loss."""
