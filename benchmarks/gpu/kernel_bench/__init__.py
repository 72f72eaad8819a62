"""What bench_kernels.py and tune.py share."""
