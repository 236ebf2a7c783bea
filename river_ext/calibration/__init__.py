"""A river that is refined with the activations of texts."""
