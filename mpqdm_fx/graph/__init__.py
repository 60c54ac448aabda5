"""The one intermediate representation: module-level FX graphs, how they are made and checked."""
