"""Version 1 of every contract."""
