"""Repairs of the rounding error: one file each."""
