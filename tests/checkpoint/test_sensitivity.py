"""MBQ's ratio against gradients taken one by one, with autograd alone."""

from collections import defaultdict
from pathlib import Path

import pytest
import torch
from qe_pipelines.evaluate import encode

from qe_dist.checkpoint import sensitivity as module
from qe_dist.checkpoint.sensitivity import check_memory, sensitivity
from qe_dist.core.batch import IMAGE
from qe_dist.core.errors import ConfigError
from qe_dist.serve.loading import load_model

ROOT = Path(__file__).parents[2]
MODEL, DATA = ROOT / "models" / "outlier", ROOT / "models" / "data" / "calibration.jsonl"


def test_the_ratio_is_that_of_the_gradients() -> None:
    arch, examples = encode(MODEL, DATA)
    examples = [e for e in examples if bool((e.modality == IMAGE).any())][:3]
    found = sensitivity(load_model(MODEL).float(), arch, examples)
    assert found.tokens["image"] == sum(int((e.modality == IMAGE).sum()) for e in examples)

    model = load_model(MODEL).float()
    made: dict[str, torch.Tensor] = {}
    for name in found.places:
        index, _, path = name.partition(" ")
        linear = model.get_decoder().layers[int(index)].get_submodule(path)
        linear.register_forward_hook(lambda _m, _i, y, name=name: made.__setitem__(name, y))
    sums: dict[tuple[str, bool], float] = defaultdict(float)
    counts = {True: 0, False: 0}
    for e in examples:
        loss = model(**arch.model_inputs([e], pad=0), labels=e.labels[None], use_cache=False).loss
        gradients = torch.autograd.grad(loss, [made[name] for name in found.places])
        for image in counts:
            chosen = (e.modality == IMAGE) == image
            counts[image] += int(chosen.sum())
            for name, gradient in zip(found.places, gradients, strict=True):
                sums[name, image] += float(gradient[0, chosen].double().abs().mean(dim=1).sum())
    for name, ratio in zip(found.places, found.image_to_text, strict=True):
        wanted = sums[name, True] / counts[True] / (sums[name, False] / counts[False])
        assert ratio == pytest.approx(wanted, rel=1e-4, abs=1e-9)
    assert found.image_weight == sorted(found.image_to_text)[5] / 2 + sorted(found.image_to_text)[6] / 2


def test_without_images_there_is_no_ratio() -> None:
    arch, examples = encode(MODEL, DATA)
    stories = [e for e in examples if not bool((e.modality == IMAGE).any())]
    assert stories
    with pytest.raises(ConfigError, match="no sample has an image, text and an answer"):
        sensitivity(load_model(MODEL).float(), arch, stories)


def test_a_model_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_memory(2**20)
    free = module.psutil.virtual_memory().available
    with pytest.raises(ConfigError, match=r"backward pass takes about .* GiB.*image_weight as published"):
        check_memory(free)
