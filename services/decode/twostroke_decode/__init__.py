"""The decode worker's service process."""
