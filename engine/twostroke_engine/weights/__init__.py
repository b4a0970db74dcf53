"""Checkpoints on disk, and how parameters pull their slices from them."""
