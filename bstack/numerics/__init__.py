"""Low-rank approximation, error measures, refits: arrays in, arrays out. No files, no models."""
