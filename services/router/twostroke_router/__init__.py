"""The router: text in, text out. It owns every request from its door to its end, and imports no torch."""
