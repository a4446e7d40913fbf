"""What a run shows: one HTML page, one block at the end, one table over many runs."""
