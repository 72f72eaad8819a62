"""python -m tests.vllm.transformers_serve serve ...: `python -m qe_dist.serve.hf serve ...`, with images.

torchvision's wheel decodes images by a library for CUDA builds of torch; here PIL does it.
"""

import io
import sys
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def decode(data: Tensor, *_: Any, **__: Any) -> Tensor:
    """[C, H, W], as torchvision.io.decode_image."""
    with Image.open(io.BytesIO(data.numpy().tobytes())) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


if __name__ == "__main__":
    from transformers import image_utils

    image_utils.decode_image = decode
    from qe_dist.serve.hf import main

    sys.argv[0] = "transformers"
    main()
