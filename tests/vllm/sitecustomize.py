"""Lets torchvision be imported beside a CPU build of torch: its Python code wants two operators to be declared."""

import sys
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class Declare:
    """Declares them when torchvision is imported for the first time, and not when Python starts."""

    library: Any = None

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "torchvision" or self.library:
            return None
        import torch

        self.library = torch.library.Library("torchvision", "DEF")
        for operator in OPERATORS:
            self.library.define(operator)
        return PathFinder.find_spec(name, path)


sys.meta_path.insert(0, Declare())
