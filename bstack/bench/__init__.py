"""``bstack bench``: the quality, speed and memory of a .bstk file at several sizes, beside its original and baselines."""
