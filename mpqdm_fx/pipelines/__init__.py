"""A whole diffusers pipeline becomes a folder of programs for phones, and a runner."""
