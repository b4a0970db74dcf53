"""The shared body of both worker services: an engine process on one side, routers and peers on the other. No torch."""
