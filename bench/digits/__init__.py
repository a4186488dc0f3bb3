"""A small GFL detector on scenes of scanned digits: what bench/train_digits.py trains."""
