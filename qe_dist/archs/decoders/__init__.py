"""Decoder families, one file each: what `Decoder` in archs/base.py asks for."""
