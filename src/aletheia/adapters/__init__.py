"""From a plan to a PEFT model: which modules are adapted, where adapters start, what takes back quantization."""
