"""Running a quantized checkpoint."""
