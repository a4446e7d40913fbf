"""Objectives: what is matched between student and teacher, or between student and labels."""
