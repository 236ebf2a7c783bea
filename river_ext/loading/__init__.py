"""From a checkpoint's files to weights and text."""
