"""Data sets (what) and streams (in which order); each data set states its licence and its source."""
