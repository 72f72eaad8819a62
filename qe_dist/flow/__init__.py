"""The pipeline, in plain Python. `local.py` is the whole of it in one process."""
