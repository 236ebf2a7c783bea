"""Thresholds measured on a user's own prompts, and chosen for a target: `river calibrate`."""
