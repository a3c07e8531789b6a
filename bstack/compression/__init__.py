"""The stages of a compression, one file each; `bstack.compress`, in api.py, runs them."""
