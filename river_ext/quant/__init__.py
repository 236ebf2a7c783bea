"""The exit river: 4-bit weights, made and stored."""
