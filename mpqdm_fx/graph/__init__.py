"""The one intermediate representation: module-level FX graphs."""
