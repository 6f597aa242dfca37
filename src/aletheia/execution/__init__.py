"""How a step is computed on the device: with exact results, at less cost than the plain way."""
