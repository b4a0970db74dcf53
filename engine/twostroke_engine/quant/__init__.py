"""Number formats of weights: which tensors a linear layer needs, and how it multiplies with them."""
