"""The stages of a compression, one file each; `bstack.compress`, in entrance.py, runs them."""
