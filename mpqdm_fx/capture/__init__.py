"""From a model to its graph: traced with torch.export, raised to modules, checked and explained."""
