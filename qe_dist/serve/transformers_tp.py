"""Tensor parallelism in transformers: our styles in the plan of a model, so that a rank reads from disk what it holds.

While the weights are loaded, a parameter that is cut is a DTensor: transformers' loader takes this rank's part of it.
After that it is a plain tensor, and the module one that is merely smaller. Only the all-reduce of a row-parallel linear
is left; a token's expert is the same on all ranks, for routers read inputs that all ranks have (numerics/sharding.py).
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer

from qe_dist.core.errors import CheckpointError, ConfigError
from qe_dist.core.layout import BlockLayout, GroupLayout
from qe_dist.numerics.sharding import Parallel, inputs_dim, local_channels, outputs_dim, why_not
from qe_dist.serve.linear import QEInput, QELinear, submodule

if TYPE_CHECKING:
    from transformers import PreTrainedModel

THEIRS: dict[str | None, Parallel] = {"colwise": "column", "rowwise": "row"}
"""How transformers says that a linear is cut."""
OTHER_SIZES = ("fsdp_size", "dp_replicate_size", "pp_size", "ep_size")
HEADS = ("num_attention_heads", "num_key_value_heads")


class _Column(TensorParallelLayer):
    """A linear that makes some of the outputs."""

    def dim(self, name: str, shape: tuple[int, ...]) -> int | None:
        return 0 if name == "bias" else outputs_dim(name)

    def shard_param(self, module: nn.Module, param: str, mesh: DeviceMesh) -> None:
        whole = module.get_parameter(param)
        dim = self.dim(param, tuple(whole.shape))
        if dim is not None:
            part = distribute_tensor(whole, mesh, [Shard(dim)], src_data_rank=None)
            module.register_parameter(param, nn.Parameter(part, requires_grad=False))


class _RowInput(_Column):
    """What belongs to the input of a row-parallel group."""

    def dim(self, name: str, shape: tuple[int, ...]) -> int | None:
        return inputs_dim(name, shape)


class _Row(_RowInput):
    """A linear that reads some of the inputs: its output is a summand."""

    def transform_output_post_forward(self, module: nn.Module, output: Tensor, mesh: DeviceMesh) -> Tensor:
        dist.all_reduce(output.detach(), group=mesh.get_group())
        return output


OURS = {"qe_column": _Column(), "qe_row": _Row(), "qe_row_input": _RowInput()}


def plan(model: "PreTrainedModel", layouts: Sequence[BlockLayout], asked: Any) -> bool:
    """Puts our styles in the place of transformers' for the linears of the decoder blocks; whether there is to cut.

    layouts: of all blocks; asked: the DistributedConfig. ConfigError, with the layer or option named, where the model
    cannot be cut like that.
    """
    if other := [name for name in OTHER_SIZES if (getattr(asked, name, None) or 1) > 1]:
        raise ConfigError(f"{other[0]}={getattr(asked, other[0])}: a quantized checkpoint is cut by tp_size alone")
    size = asked.tp_size or 1
    if size == 1:
        return False
    if isinstance(asked.tp_plan, dict):
        raise ConfigError("tp_plan: a quantized checkpoint has one way to be cut; leave it out, or say 'auto'")
    blocks, config = model.get_decoder().layers, model.config.get_text_config()
    prefix = next(name for name, module in model.named_modules() if module is blocks)
    for name in HEADS:
        if (count := getattr(config, name, size)) % size:
            raise ConfigError(f"{prefix}: {name}={count} does not divide over {size} ranks; choose another tp_size")
    theirs = dict(model.tp_plan)
    for index, layout in enumerate(layouts):
        parallel = {name: _parallel(theirs, prefix, group) for name, group in layout.groups.items()}
        for name, group in layout.groups.items():
            linears = {linear: submodule(blocks[index], linear, nn.Linear) for linear in group.linears}
            if why := _why_not(linears, group, parallel[name], parallel[group.router_input], size):
                raise ConfigError(f"{prefix}.{index}.{name}: {why}; choose another tp_size, or load it whole")
            model.tp_plan.update({f"{prefix}.*.{linear}": f"qe_{parallel[name]}" for linear in linears})
            if parallel[name] == "row":
                model.tp_plan[f"{prefix}.*.{name}_input"] = "qe_row_input"
    for name, style in OURS.items():
        ALL_PARALLEL_STYLES.register(name, style)  # type: ignore[arg-type]  # theirs are instances, too
    return True


def _parallel(plan: Mapping[str, str], prefix: str, group: GroupLayout) -> Parallel | None:
    """None where transformers has no plan, or another, for the linears of the group."""
    found = {THEIRS.get(plan.get(f"{prefix}.*.{linear}")) for linear in group.linears}
    return found.pop() if len(found) == 1 else None


def _why_not(
    linears: Mapping[str, nn.Linear],
    group: GroupLayout,
    own: Parallel | None,
    routers: Parallel | None,
    size: int,
) -> str | None:
    """own, routers: how the group is cut, and that whose input its router reads."""
    if own is None:
        return f"transformers {transformers.__version__} has no plan to cut {', '.join(linears)}"
    if group.routed and routers == "row":
        return f"its router reads the input of {group.router_input}, of which a rank has only a part"
    outputs = {name: linear.out_features for name, linear in linears.items()}
    inputs = next(iter(linears.values())).in_features
    return why_not(group.scheme, outputs, inputs, own, size, group.rotated_block)


@torch.no_grad()
def settle(block: nn.Module, layout: BlockLayout, prefix: str) -> None:
    """Makes the parts that were loaded the plain parameters of smaller modules. CheckpointError for one that is of
    another shape, which transformers does not see before 5.22. prefix: of the block's names."""
    for name, group in layout.groups.items():
        linears = {linear: submodule(block, linear, QELinear) for linear in group.linears}
        packed = next(iter(linears.values())).weight_packed
        assert isinstance(packed, DTensor), "every linear of the plan is cut"
        mesh, row = packed.device_mesh, packed.placements == (Shard(1),)
        rank, size = mesh.get_local_rank(), mesh.size()
        for linear_name, linear in linears.items():
            local = _local(linear, f"{prefix}{linear_name}")
            if row and rank > 0 and "bias" in local:
                local["bias"].zero_()  # one of the summands has it
            _set(linear, local)
            if row:
                linear.in_features //= size
            else:
                linear.out_features //= size
        if row:
            part = submodule(block, f"{name}_input", QEInput)
            part.in_features //= size
            _set(part, local_channels(_local(part, f"{prefix}{name}_input"), part.in_features, rank))


def _local(module: nn.Module, module_name: str) -> dict[str, Tensor]:
    tensors = {name: parameter.data for name, parameter in module.named_parameters(recurse=False)}
    for name, whole in tensors.items():
        if isinstance(whole, DTensor):
            part, size, cut = whole.to_local(), whole.device_mesh.size(), whole.placements[0]
            assert isinstance(cut, Shard), "what is not cut is a plain tensor"
            wanted = tuple(n // size if i == cut.dim else n for i, n in enumerate(whole.shape))
            if part.shape != wanted:
                raise CheckpointError(f"{module_name}.{name}: a rank finds {tuple(part.shape)}, expected {wanted}")
            tensors[name] = part
    return tensors


def _set(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
