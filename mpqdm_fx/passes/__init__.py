"""Graph passes: one pass, one file, one class, named by a verb."""
