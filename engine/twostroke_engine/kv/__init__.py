"""The KV cache: its shape, its blocks, who references them, and their hashes."""
