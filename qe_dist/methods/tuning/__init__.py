"""Tuning of whole blocks, one file each."""
