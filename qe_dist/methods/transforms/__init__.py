"""Transforms of the input and, inversely, of the weight: one file each."""
