"""Triton kernels, one a file; each file also holds the function that launches its kernel."""
