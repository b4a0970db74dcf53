"""The arithmetic: tensors in, tensors out. Imports torch and triton, and nothing of ours."""
