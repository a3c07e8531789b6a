"""Importance of blocks -> the universal stack."""
