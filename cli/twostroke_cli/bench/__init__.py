"""`twostroke bench`: load on any OpenAI server, what it answered and when, side by side, in a table and a report."""
