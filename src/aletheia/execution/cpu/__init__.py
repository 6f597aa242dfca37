"""What is quicker on a processor."""
