"""The `twostroke` command: a cluster on one machine, models for it, and talking to it."""
