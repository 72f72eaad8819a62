"""Distributed post-training quantization of vision-language models with Quant Experts.

Importing this package teaches transformers to load our checkpoints (as soon as transformers is imported).
"""

from qe_dist.core.version import VERSION as __version__
from qe_dist.serve.registration import register_on_import

__all__ = ["__version__"]

register_on_import()
