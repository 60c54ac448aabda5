"""What a pipeline class of diffusers is made of, and how it draws: one file a family."""
