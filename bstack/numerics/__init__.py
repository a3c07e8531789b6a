"""Numerical methods on arrays: rotation, error feedback, hessians, groups, outliers, low rank. No files, no models."""
