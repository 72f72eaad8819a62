"""Ways to embed, one file each: what `Frontend` in archs/base.py asks for."""
