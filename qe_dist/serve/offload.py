"""Blocks that accelerate keeps on disk, or on the CPU beside a GPU, while they do not run (`device_map`).

By itself it brings in each module's parameters for the call of that module. The groups of a block share more than that
(the router of one is read with the input of another), so a block comes and goes as a whole, with all that was made
from its parameters.
"""

from collections.abc import Iterable
from typing import Any

from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from accelerate.utils import PrefixedDataset
from torch import nn

from qe_dist.core.errors import ConfigError
from qe_dist.serve.linear import QEInput, QELinear


class _WholeBlock(AlignDevicesHook):
    def post_forward(self, module: nn.Module, output: Any) -> Any:
        for part in parts(module):
            part.forget()
        return super().post_forward(module, output)


def parts(block: nn.Module) -> list[QEInput | QELinear]:
    return [module for module in block.modules() if isinstance(module, QEInput | QELinear)]


def hook_blocks(blocks: Iterable[nn.Module], prefix: str) -> None:
    """After loading: blocks with parameters on `meta` get one hook in the place of accelerate's many. prefix: their
    name in the model. ConfigError for a block that is offloaded in part."""
    for index, block in enumerate(blocks):
        away = {parameter.is_meta for parameter in block.parameters()}
        if away == {True, False}:
            raise ConfigError(f"device_map offloads only a part of {prefix}.{index}; give the whole block one place")
        if away == {True}:
            _hook(block, f"{prefix}.{index}.")


def _hook(block: nn.Module, prefix: str) -> None:
    own = parts(block)
    one: Any = next(part for part in own if any(True for _ in part.parameters()))._hf_hook
    for part in own:
        part.offloaded = True
    remove_hook_from_module(block, recurse=True)
    hook = _WholeBlock(
        one.execution_device,
        offload=True,
        weights_map=PrefixedDataset(one.weights_map.dataset, prefix),
        place_submodules=True,
        skip_keys=one.skip_keys,
    )
    add_hook_to_module(block, hook)
