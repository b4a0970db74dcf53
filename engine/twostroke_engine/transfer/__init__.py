"""Moving a prompt's KV from the worker that computed it to the one that decodes."""
