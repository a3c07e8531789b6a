"""From a container to a model that runs."""
