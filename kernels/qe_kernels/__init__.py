"""Triton kernels for the quantized linear. There are none yet: they come with a later issue.

Until then every quantized linear runs on the torch reference in `qe_dist`.
"""
