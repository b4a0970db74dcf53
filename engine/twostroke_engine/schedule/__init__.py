"""Which tokens are computed in a step, and in whose memory. Pure Python: no torch, no clock, no randomness."""
