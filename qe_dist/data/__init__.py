"""Calibration and evaluation samples: where they come from (sources/), what they say (shapes.py), their pixels."""
