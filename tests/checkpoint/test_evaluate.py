"""Quality figures mean what they say."""

import math

import pytest
import torch
import torch.nn.functional as F
from qe_pipelines.demo import generate

from qe_dist import archs
from qe_dist.checkpoint.evaluate import evaluate, save_reference
from qe_dist.data.samples import load_images, read_samples
from tests.tiny import DATA, MODELS

ARCH = archs.get("qwen2_vl")


@pytest.fixture(scope="module")
def model():
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(MODELS / "plain", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def encoder():
    return ARCH.encoder(MODELS / "plain")


def test_exact_match_is_what_greedy_generation_gives(model, encoder):
    samples = read_samples(DATA / "evaluation.jsonl")[:24]
    for sample in samples:
        examples = [encoder(sample, load_images(sample))]
        counted = evaluate(model, ARCH, examples).summary()["accuracy"]
        expected = sample.messages[-1]["content"][0]["text"]
        assert counted == (generate(model, ARCH, encoder, sample) == expected), sample.messages


def test_batching_and_padding_change_nothing(model, encoder):
    samples = read_samples(DATA / "evaluation.jsonl")
    examples = [encoder(s, load_images(s)) for s in (*samples[:9], *samples[-3:])]
    one, many = (evaluate(model, ARCH, examples, tokens=size).summary() for size in (1, 4096))
    assert one["accuracy"] == many["accuracy"]
    assert one["perplexity"] == pytest.approx(many["perplexity"], rel=1e-4)


def test_perplexity_and_kl_against_a_plain_computation(model, encoder, tmp_path):
    example = encoder(read_samples(DATA / "evaluation.jsonl")[-1], [])
    with torch.no_grad():
        logits = model(input_ids=example.input_ids[None]).logits[0, :-1].double()
    nll = F.cross_entropy(logits, example.input_ids[1:])
    summary = evaluate(model, ARCH, [example], save_reference(model, ARCH, [example], tmp_path)).summary()
    assert summary["perplexity"] == pytest.approx(math.exp(nll), rel=1e-4)
    assert summary["kl"] == pytest.approx(0, abs=1e-9)


def test_kl_of_a_changed_model_is_the_mean_divergence(model, encoder, tmp_path):
    from copy import deepcopy

    changed = deepcopy(model)
    with torch.no_grad():
        changed.lm_head.weight.mul_(0.9)
    example = encoder(read_samples(DATA / "evaluation.jsonl")[-1], [])
    with torch.no_grad():
        p, q = (m(input_ids=example.input_ids[None]).logits[0, :-1].double().log_softmax(-1) for m in (model, changed))
    expected = (p.exp() * (p - q)).sum(-1).mean()
    assert evaluate(changed, ARCH, [example], save_reference(model, ARCH, [example], tmp_path)).summary()[
        "kl"
    ] == pytest.approx(expected.item(), rel=1e-3)
