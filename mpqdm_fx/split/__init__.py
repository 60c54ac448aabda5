"""One graph in several methods: what does not change from step to step, tables of timesteps."""
