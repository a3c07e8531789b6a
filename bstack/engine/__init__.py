"""Run a model from a container."""
