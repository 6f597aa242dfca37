"""From a plan to a PEFT model: which modules are adapted, what takes back quantization."""
