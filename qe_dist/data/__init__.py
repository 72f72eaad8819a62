"""Calibration and evaluation samples: reading and decoding."""
