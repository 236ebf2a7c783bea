"""The bundled demo model and the generator of its training and test text."""
