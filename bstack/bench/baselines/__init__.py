"""Reference implementations of one-size quantisers, to compare with. No file is written with them.

Plain code on purpose: short, close to the papers, no kernels.
"""
