"""How pipelines draw: one loop a kind. A kind is the name of its file here."""
