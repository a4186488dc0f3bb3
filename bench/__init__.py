"""Benchmarks of the ops (run.py) and a training run on real images (train_digits.py)."""
