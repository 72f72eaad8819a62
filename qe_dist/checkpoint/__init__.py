"""Tools for a finished checkpoint: verify, tensor-parallel check, export, evaluation."""
