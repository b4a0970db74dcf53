"""From logits to tokens: adjustments of logits, sampling, logprobs."""
