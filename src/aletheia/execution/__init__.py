"""How a step is computed on the device at hand: exact, and cheaper than the plain way."""
