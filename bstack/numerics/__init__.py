"""Numerical methods on arrays: rotation, error feedback, hessians, groups with outliers. No files, no models."""
