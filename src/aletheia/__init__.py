"""Fine-tune only the layers of a language model that the task needs."""

__version__ = "0.1.0"
