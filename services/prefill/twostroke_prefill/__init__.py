"""The prefill worker's service process."""
