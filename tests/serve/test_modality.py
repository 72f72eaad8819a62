"""Checkpoints that treat text and images differently: every token gets what its modality asks for."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from qe_dist import archs
from qe_dist.core.batch import IMAGE, TEXT
from qe_dist.core.errors import ConfigError
from qe_dist.core.quantized import QuantizedLinear, input_from_tensors, repair_from_tensors
from qe_dist.core.sample import Example
from qe_dist.core.scheme import Scheme
from qe_dist.core.spec import BlockSpec, InputGroup
from qe_dist.data.samples import load_images, read_samples
from qe_dist.flow.config import RunConfig
from qe_dist.flow.local import quantize
from qe_dist.io.weights import SafetensorsSource
from qe_dist.methods.recipes import load_recipe, recipe_from
from qe_dist.numerics.packing import unpack
from qe_dist.numerics.reference import linear_forward, prepare, route
from qe_dist.serve.modality import TokenModality
from tests.tiny import DATA, calibration, tiny_model

ARCH = archs.get("qwen2_vl")
SMOOTHED = {"scheme": "w4a6", "transform": {"name": "smoothquant"}, "compensation": {"name": "cross_modal"}}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module", params=["masquant", "smoothquant+cross_modal"])
def quantized(request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts by modality, with scales by modality and without."""
    recipe = load_recipe("masquant-w4a6") if request.param == "masquant" else recipe_from(SMOOTHED)
    root = tmp_path_factory.mktemp("quantized")
    quantize(RunConfig(source, recipe, calibration(root / "data"), root / "out", sample_tokens=256))
    return root / "out"


def load(folder: Path) -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def model(quantized: Path) -> Any:
    return load(quantized)


@pytest.fixture(scope="module")
def prompts(source: Path) -> list[Example]:
    """Two questions about images, of different length, and one without."""
    encoder = ARCH.encoder(source)
    samples = read_samples(DATA / "evaluation.jsonl")
    asked = [encoder.prompt(s, load_images(s)) for s in (samples[0], samples[4])]
    plain = encoder(samples[-1], [])
    assert len({len(e.input_ids) for e in (*asked, plain)}) == 3
    assert (asked[0].modality == IMAGE).any()
    return [*asked, plain]


class _Reference(nn.Module):
    """A linear by the reference, told which tokens are of images."""

    def __init__(self, tensors: dict[str, Tensor], spec: BlockSpec, group: InputGroup, name: str, modality: Tensor):
        super().__init__()
        of = {module: _within(tensors, f"{spec.prefix}{module}.") for module in (group.module, name)}
        own = of[name]
        codes = unpack(own["weight_packed"], 4, int(own["weight_shape"][1]))
        self.linear = QuantizedLinear(codes, own["weight_scale"], **repair_from_tensors(own))
        self.part, self.modality = input_from_tensors(of[group.module]), modality.flatten()

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        ready = prepare(self.part, rows, route(self.part, None, self.modality), Scheme(4, 6), self.modality)
        return linear_forward(self.linear, ready).unflatten(0, x.shape[:2])


def _within(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def block_by_block(source: Path, quantized: Path, examples: list[Example]) -> Tensor:
    """Logits of right-padded samples, from the files alone."""
    weights = SafetensorsSource(source)
    batch = ARCH.prelude(weights, "cpu", torch.float32)(examples, 0)
    modality = batch.modality.clamp_min(TEXT)  # what padding is does not matter
    for spec in ARCH.spec(weights).blocks:
        block = ARCH.block(weights, spec, "cpu", torch.float32)
        tensors = load_file(quantized / f"block-{spec.index:05d}.safetensors")
        for group in spec.groups:
            for linear in group.linears:
                block.set_submodule(linear.name, _Reference(tensors, spec, group, linear.name, modality))
        batch = batch.with_hidden(ARCH.run_block(block, batch, spec.index))
    full = load(source)
    with torch.no_grad():
        return full.lm_head(full.get_decoder().norm(batch.hidden))


@torch.no_grad()
def logits_of(model: Any, examples: list[Example]) -> Tensor:
    return model(**ARCH.model_inputs(examples, pad=0), use_cache=False).logits


def test_the_loaded_model_is_the_reference_block_by_block(
    source: Path, quantized: Path, model: Any, prompts: list[Example]
) -> None:
    found, wanted = logits_of(model, prompts), block_by_block(source, quantized, prompts)
    for row, example in enumerate(prompts):
        real = slice(0, len(example.input_ids))
        assert (found[row, real] - wanted[row, real]).abs().max() < 1e-3 * wanted.abs().max()


def left_padded(examples: list[Example]) -> dict[str, Tensor]:
    """Keyword arguments of `generate`."""
    inputs = ARCH.model_inputs(examples, pad=0)
    lengths = [len(e.input_ids) for e in examples]
    for name in ("input_ids", "mm_token_type_ids"):
        rows = zip(inputs[name], lengths, strict=True)
        inputs[name] = torch.stack([row.roll(len(row) - length) for row, length in rows])
    longest = max(lengths)
    inputs["attention_mask"] = (torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]).long()
    return inputs


def generate(model: Any, inputs: dict[str, Tensor], **options: Any) -> Any:
    return model.generate(
        **inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, return_dict_in_generate=True,
        output_logits=True, pad_token_id=0, **options,
    )  # fmt: skip


def alone(example: Example) -> dict[str, Tensor]:
    return ARCH.model_inputs([example], pad=0) | {"attention_mask": torch.ones(1, len(example.input_ids)).long()}


def test_generating_step_by_step_is_reading_the_whole(model: Any, prompts: list[Example]) -> None:
    """Prefill with images, then steps of one text token each: the same logits as one pass over everything."""
    for example in prompts:
        out = generate(model, alone(example))
        new = out.sequences[0, len(example.input_ids) :]
        whole = ARCH.model_inputs([example], pad=0)
        whole["input_ids"] = out.sequences
        whole["mm_token_type_ids"] = torch.cat([whole["mm_token_type_ids"], torch.zeros(1, len(new)).int()], dim=1)
        with torch.no_grad():
            wanted = model(**whole, use_cache=False).logits[0, len(example.input_ids) - 1 : -1]
        found = torch.cat(out.logits)
        assert (found - wanted).abs().max() < 1e-3 * wanted.abs().max()


@pytest.mark.parametrize("beams", [1, 3])
def test_padding_on_the_left_changes_nothing(model: Any, prompts: list[Example], beams: int) -> None:
    together = generate(model, left_padded(prompts), num_beams=beams)
    longest = max(len(e.input_ids) for e in prompts)
    for row, example in enumerate(prompts):
        single = generate(model, alone(example), num_beams=beams)
        assert torch.equal(together.sequences[row, longest:], single.sequences[0, len(example.input_ids) :])
        if beams == 1:
            for step, step_alone in zip(together.logits, single.logits, strict=True):
                assert (step[row] - step_alone[0]).abs().max() < 1e-3 * step_alone.abs().max()


def as_embeddings(model: Any, source: Path, example: Example) -> dict[str, Tensor]:
    """What a caller gives who has merged text and images already."""
    whole = ARCH.model_inputs([example], pad=0)
    names = ("image_grid_thw", "mm_token_type_ids")
    positions, _ = model.model.get_rope_index(whole["input_ids"], **{n: whole[n] for n in names})
    hidden = ARCH.prelude(SafetensorsSource(source), "cpu", torch.float32)([example], 0).hidden
    return {"inputs_embeds": hidden, "position_ids": positions}


@torch.no_grad()
def test_an_image_token_gets_other_treatment_than_a_text_token(
    source: Path, model: Any, prompts: list[Example]
) -> None:
    """The same hidden states, and only the modality that the caller tells is different."""
    example = prompts[0]
    inputs = as_embeddings(model, source, example)
    images = example.modality[None] == IMAGE
    wanted = logits_of(model, [example])
    told = model(**inputs, mm_token_type_ids=images.int(), use_cache=False).logits
    assert (told - wanted).abs().max() < 1e-3 * wanted.abs().max()
    as_text = model(**inputs, mm_token_type_ids=torch.zeros_like(images).int(), use_cache=False).logits
    first = int(images[0].nonzero()[0])
    assert torch.allclose(as_text[0, :first], wanted[0, :first], rtol=1e-3, atol=1e-4)
    assert ((as_text - wanted)[images].norm(dim=1) > 0.01 * wanted[images].norm(dim=1)).all()


def test_it_is_refused_to_guess(source: Path, model: Any, prompts: list[Example]) -> None:
    inputs = as_embeddings(model, source, prompts[0])
    with pytest.raises(ConfigError, match="call the model with input_ids, or with mm_token_type_ids"):
        model(**inputs, use_cache=False)
    with pytest.raises(ConfigError, match="tell of 3 tokens, the model works on"):
        model(**inputs, mm_token_type_ids=torch.zeros(1, 3).int(), use_cache=False)
    logits_of(model, prompts[:1])  # what an earlier call was told is forgotten
    with pytest.raises(ConfigError, match="only inside the model"):
        model.get_decoder()(**inputs, use_cache=False)


def test_the_inner_model_and_positional_arguments_will_do(model: Any, prompts: list[Example]) -> None:
    inputs = ARCH.model_inputs(prompts[:1], pad=0)
    with torch.no_grad():
        hidden = model.model(inputs.pop("input_ids"), **inputs, use_cache=False).last_hidden_state
        assert torch.equal(model.lm_head(hidden), logits_of(model, prompts[:1]))


def test_a_saved_and_loaded_checkpoint_still_knows(model: Any, prompts: list[Example], tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(load(tmp_path), prompts), logits_of(model, prompts))


def test_who_does_not_need_it_is_not_asked(source: Path, prompts: list[Example], tmp_path: Path) -> None:
    recipe = recipe_from({"scheme": "w4a6", "compensation": {"name": "quant_experts", "num_experts": 2}})
    quantize(RunConfig(source, recipe, calibration(tmp_path / "data"), tmp_path / "out", sample_tokens=256))
    model = load(tmp_path / "out")
    hooks = [h for m in model.modules() for h in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]
    assert hooks == []
    with torch.no_grad():
        assert model(**as_embeddings(model, source, prompts[0]), use_cache=False).logits.isfinite().all()


class _Listening(nn.Module):
    def __init__(self, *image_ids: int) -> None:
        super().__init__()
        self.modality = TokenModality(image_ids, "kinds")
        self.modality.follow(self)

    def forward(self, input_ids: Tensor | None = None, **kwargs: Any) -> list[int]:
        return self.modality.of(torch.zeros(3, 8)).tolist()


IDS, TYPES = torch.tensor([[5, 9, 6]]), torch.tensor([[0, 1, 0]])


@pytest.mark.parametrize(
    ("image_ids", "wanted"),
    [
        ((5,), [1, 0, 0]),
        ((5, 6), [1, 0, 1]),
        ((), [0, 1, 0]),  # no token stands for images, so the types must tell
    ],
)
def test_token_ids_come_before_types(image_ids: tuple[int, ...], wanted: list[int]) -> None:
    assert _Listening(*image_ids)(IDS, kinds=TYPES) == wanted


def test_ids_tell_nothing_where_no_token_stands_for_an_image() -> None:
    with pytest.raises(ConfigError, match="or with kinds beside inputs_embeds"):
        _Listening()(IDS)


def test_what_a_call_was_told_is_forgotten_when_it_fails() -> None:
    model = _Listening(5)
    with pytest.raises(ConfigError, match="tell of 2 tokens, the model works on 3"):
        model(IDS[:, :2])
    with pytest.raises(ConfigError, match="only inside the model"):
        model.modality.of(torch.zeros(3, 8))
