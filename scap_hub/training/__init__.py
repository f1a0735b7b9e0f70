"""Data, evaluation and fine-tuning, all through accelerate."""
