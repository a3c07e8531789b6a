"""Texts, token windows, and from them hessians and sensitivities, with one layer in memory at a time."""
