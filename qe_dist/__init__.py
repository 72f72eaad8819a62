"""Distributed post-training quantization of vision-language models with Quant Experts.

Importing this package teaches transformers to load our checkpoints (as soon as transformers is imported).
"""

from qe_dist.serve.registration import register_on_import

__version__ = "0.2.0"

register_on_import()
