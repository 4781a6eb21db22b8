"""Measurements of speed and memory that end in run records."""
