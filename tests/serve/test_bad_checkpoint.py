"""A checkpoint that is not what config.json says is refused by from_pretrained, with the tensor named."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qe_dist.core.errors import CheckpointError
from qe_dist.io.checkpoint import MANIFEST

Change = Callable[[dict[str, Tensor]], dict[str, Tensor] | None]


@pytest.fixture
def loaded(checkpoints: dict[str, Path], tmp_path: Path) -> Callable[[Change], Any]:
    """loaded(change): the model in a copy of which one block's tensors were changed."""

    def load(change: Change) -> Any:
        from transformers import AutoModelForImageTextToText

        shutil.copytree(checkpoints["qe-extract-w4a6"], tmp_path / "copy")
        (tmp_path / "copy" / MANIFEST).unlink()  # it would tell before anything is loaded
        path = tmp_path / "copy" / "block-00005.safetensors"
        tensors = load_file(path)
        save_file(change(tensors) or tensors, path)
        return AutoModelForImageTextToText.from_pretrained(tmp_path / "copy", dtype=torch.float32)

    return load


def name_of(tensors: dict[str, Tensor], end: str) -> str:
    return next(name for name in tensors if name.endswith(end))


def lose(end: str) -> Change:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if not name.endswith(end)}


def alter(end: str, change: Callable[[Tensor], Tensor]) -> Change:
    def changed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        name = name_of(tensors, end)
        return tensors | {name: change(tensors[name]).contiguous()}

    return changed


def test_as_it_is_it_loads(loaded: Any) -> None:
    assert loaded(lambda tensors: tensors).get_decoder().layers[5].mlp.down_proj.in_features == 640


@pytest.mark.parametrize("end", ["mlp.down_proj.weight_scale", "mlp.down_input.router", "input_layernorm.weight"])
def test_a_missing_tensor(loaded: Any, end: str) -> None:
    with pytest.raises(CheckpointError, match=rf"copy has no model\.\S*layers\.5\.\S*{end}; copy it again"):
        loaded(lose(end))


def test_many_missing_tensors_are_counted(loaded: Any) -> None:
    with pytest.raises(
        CheckpointError, match=r"has no model\.\S*layers\.5\.mlp\.down_proj\.weight_scale \(and 6 more such"
    ):
        loaded(lose("_proj.weight_scale"))


def test_a_tensor_that_nobody_knows(loaded: Any) -> None:
    with pytest.raises(CheckpointError, match=r"layers\.5\.mlp\.down_proj\.weight_zero, which the model does not know"):
        loaded(lambda t: t | {name_of(t, "down_proj.weight_scale").replace("_scale", "_zero"): torch.zeros(3)})


def test_a_tensor_of_another_shape(loaded: Any) -> None:
    with pytest.raises(CheckpointError, match=r"down_proj\.weight_packed of shape \(255, 80\), expected \(256, 80\)"):
        loaded(alter("down_proj.weight_packed", lambda tensor: tensor[:-1]))


def test_a_tensor_of_another_kind(loaded: Any) -> None:
    with pytest.raises(CheckpointError, match=r"down_input\.lr_expert_a is torch.\w+, expected torch.int8"):
        loaded(alter("down_input.lr_expert_a", lambda tensor: tensor.to(torch.int16)))


@pytest.mark.parametrize("end", ["down_proj.weight_scale", "down_input.router", "down_proj.lr_shared_columns"])
def test_a_number_that_is_none(loaded: Any, end: str) -> None:
    with pytest.raises(CheckpointError, match=rf"layers\.5\.mlp\.{end} has a NaN or Inf"):
        loaded(alter(end, lambda tensor: tensor.index_fill(0, torch.tensor([1]), torch.nan)))


def test_a_version_that_does_not_tell_what_it_found(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rather than not to look."""
    from qe_dist.serve.transformers_plugin import QEQuantizer

    monkeypatch.setattr(QEQuantizer, "_listen", lambda *_: None)
    with pytest.raises(CheckpointError, match=r"transformers 5\.\S+ does not tell which tensors of \S*copy it found"):
        loaded(lambda tensors: tensors)
