"""Publish a container on the hub, with what people and programs need to use it."""
