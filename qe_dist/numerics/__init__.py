"""Pure functions on tensors. Nothing here knows of files, models or Ray."""
