"""The bundled model, really trained, and the classifier that judges its samples."""
