"""Texts -> token windows -> per-linear input statistics and sensitivities, one layer in memory at a time."""
