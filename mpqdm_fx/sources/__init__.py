"""A name or a folder becomes a model, its scheduler and its example inputs."""
