"""From a plan to a PEFT model: the adapters, saved adapter configs, and the correction of quantization errors."""
