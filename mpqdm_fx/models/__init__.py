"""The bundled, really trained model and the programs that trained it."""
