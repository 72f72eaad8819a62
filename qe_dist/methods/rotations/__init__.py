"""Rotations of the whole model, one file each, found by name."""
