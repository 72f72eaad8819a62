"""A small block of two groups: what tuning lowers, what it keeps, and what it refuses."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qe_dist import methods
from qe_dist.core.errors import ConfigError
from qe_dist.core.quantized import QuantizedGroup
from qe_dist.core.spec import InputGroup, LinearSpec
from qe_dist.methods.base import GroupProblem
from qe_dist.methods.block import BlockProblem, Forward, TunedBlock
from qe_dist.methods.recipe import Recipe
from qe_dist.methods.recipes import load_recipe, recipe_from
from qe_dist.methods.tuning.tune import Tune, _draws
from qe_dist.numerics.stats import GroupStats
from qe_dist.numerics.tuned_linear import FrozenGroup, Group

SEQUENCES, LENGTH, WIDTH, INNER = 12, 10, 32, 48
HELD_OUT = 3
Normal = Callable[..., Tensor]


class Block:
    """x + down(relu(up(x))), on inputs whose channels go together."""

    def __init__(self, normal: Normal) -> None:
        self.up, self.down = normal(0, INNER, WIDTH) / WIDTH**0.5, normal(1, WIDTH, INNER) / INNER**0.5
        self.x = normal(2, SEQUENCES, LENGTH, 8) @ normal(3, 8, WIDTH)
        self.hidden = (self.x @ self.up.T).relu()
        self.targets = self.x + self.hidden @ self.down.T

    def problem(self, recipe: Recipe, **changes: object) -> BlockProblem:
        up = InputGroup("up", (LinearSpec("up", WIDTH, INNER, False, "column"),), "up")
        down = InputGroup("down", (LinearSpec("down", INNER, WIDTH, False, "row"),), "up")
        problems = {}
        for group, weight, x in ((up, self.up, self.x), (down, self.down, self.hidden)):
            weights = {group.name: weight}
            stats = GroupStats.empty(weights, WIDTH, recipe.needs(), sample_size=64)
            rows, read = x[HELD_OUT:].flatten(0, 1), self.x[HELD_OUT:].flatten(0, 1)
            stats.update(rows, read, torch.zeros(len(rows), dtype=torch.int8), torch.arange(len(rows)))
            problems[group.name] = GroupProblem(group, weights, stats, recipe.scheme)
        fields = {
            "groups": recipe.fit_block(problems),
            "problems": problems,
            "factor_bits": recipe.budget.factor_bits,
            "place": self.place,
            "targets": self.targets,
            "real": torch.ones(SEQUENCES, LENGTH, dtype=torch.bool),
            "held_out": torch.arange(SEQUENCES) < HELD_OUT,
            "seed": 7,
        }
        return BlockProblem(**(fields | changes))

    def place(self, groups: Mapping[str, Group]) -> Forward:
        def forward(rows: Tensor) -> Tensor:
            x = self.x[rows].flatten(0, 1)
            hidden = groups["up"].linear("up", groups["up"].prepare(x)).relu()
            y = x + groups["down"].linear("down", groups["down"].prepare(hidden))
            return y.unflatten(0, (len(rows), LENGTH))

        return forward

    def error(self, groups: Mapping[str, object], rows: slice) -> float:
        y = self.place({name: FrozenGroup(group) for name, group in groups.items()})(torch.arange(SEQUENCES)[rows])
        return float(((y - self.targets[rows]).square().sum(-1) / self.targets[rows].square().sum(-1)).mean())


def pairs(groups: Mapping[str, QuantizedGroup]) -> list[Tensor]:
    """The factors of all adapters."""
    downs = [group.input.shared_down for group in groups.values() if group.input.shared_down is not None]
    ups = [x.shared_up for group in groups.values() for x in group.linears.values() if x.shared_up is not None]
    return [factor.dense for factor in (*downs, *ups)]


def stored(tuned: TunedBlock) -> list[object]:
    """What a block holds, without reports, which have seconds."""
    return [replace(group, report=None) for group in tuned.groups.values()]


@pytest.fixture
def block(normal: Normal) -> Block:
    return Block(normal)


def recipe(name: str, **settings: object) -> Recipe:
    return replace(load_recipe(name), tuning=Tune(**({"steps": 30, "batch": 4} | settings)))


@pytest.mark.parametrize(
    "name", ["rtn+tune-w3a16g16", "rtn+tune-w4a8g16", "smoothquant+tune-w4a8g16",
             "qera+tune-w2a16g16@1f4", "lists+qera+tune-w3a8g16@1f8"],
)  # fmt: skip
def test_the_error_of_the_block_falls_on_sequences_that_nothing_was_fitted_to(block, name):
    one = recipe(name)
    problem = block.problem(one)
    tuned = one.tune(problem)
    before, after = (block.error(groups, slice(HELD_OUT)) for groups in (problem.groups, tuned.groups))
    report = tuned.report
    assert report.kept == "tuned"
    assert after < before
    assert report.loss == pytest.approx(after / before, rel=1e-4)
    assert report.error == pytest.approx(after**0.5, rel=1e-4)
    for name, group in tuned.groups.items():
        assert group.report.bytes == problem.groups[name].report.bytes


def test_factors_and_rounding_are_learned_together(block):
    """More than rounding and scales alone, from the same start."""
    one = recipe("qera+tune-w2a16g16@1f4")
    problem = block.problem(one)
    alone = replace(one, tuning=replace(one.tuning, factor_rate=0.0))
    together, frozen = (r.tune(problem) for r in (one, alone))
    start, same, other = (pairs(groups) for groups in (problem.groups, frozen.groups, together.groups))
    assert start
    assert all(map(torch.equal, start, same))
    assert not any(map(torch.equal, start, other))
    assert together.report.loss < frozen.report.loss


def test_the_closed_form_is_kept_where_tuning_does_not_beat_it(block, same):
    """Targets of training sequences that are another function's: nothing learned there helps what is held out."""
    one = recipe("rtn+tune-w4a16g16", rate=0.3)
    wrong = block.targets.clone()
    wrong[HELD_OUT:] *= -1.0
    problem = block.problem(one, targets=wrong)
    tuned = one.tune(problem)
    assert (tuned.report.kept, tuned.report.step, tuned.report.loss) == ("closed form", 0, 1.0)
    assert tuned.groups is problem.groups


def test_a_loss_that_is_not_finite_is_survived_and_recorded(block):
    """A sequence whose target is damaged."""
    one = recipe("rtn+tune-w3a16g16", batch=3)
    wrong = block.targets.clone()
    wrong[-1] = float("nan")
    tuned = one.tune(block.problem(one, targets=wrong))
    assert tuned.report.kept == "tuned"
    assert len(tuned.report.nonfinite) == 10  # 9 sequences, 3 in a step: each third step has it
    assert all(torch.isfinite(x.scale).all() for group in tuned.groups.values() for x in group.linears.values())


def test_the_same_seed_gives_the_same_bits_and_another_one_others(block, same):
    one = recipe("qera+tune-w2a16g16@1f4")
    problem = block.problem(one)
    first, second = one.tune(problem), one.tune(problem)
    assert same(stored(first), stored(second))
    other = one.tune(replace(problem, seed=8))
    assert not torch.equal(first.groups["up"].linears["up"].codes, other.groups["up"].linears["up"].codes)


def test_padding_counts_for_nothing(block, same):
    one = recipe("rtn+tune-w3a16g16", steps=5)
    real = torch.ones(SEQUENCES, LENGTH, dtype=torch.bool)
    real[4:, -3:] = False
    other = block.targets.clone()
    other[4:, -3:] = 1e3
    first, second = (one.tune(block.problem(one, real=real, targets=t)) for t in (block.targets, other))
    assert same(stored(first), stored(second))


def test_steps_see_every_sequence_before_one_comes_again_and_none_that_is_held_out(block):
    draws = _draws(block.problem(recipe("rtn+tune-w4a16g16")), 4)
    seen = torch.cat([next(draws) for _ in range(9)])
    assert all(sorted(part.tolist()) == list(range(HELD_OUT, SEQUENCES)) for part in seen.split(SEQUENCES - HELD_OUT))


def test_a_recipe_with_tuning_is_named_described_and_read_back():
    one = load_recipe("qera+tune-w4a16g64@0.25f4")
    assert one.tuning == Tune()
    assert one.quantizer.full_range, "offsets are learned on the signed range"
    assert recipe_from(one.describe()) == one
    assert load_recipe("gptq+tune-w4a16g64").quantizer != one.quantizer
    assert "tuning" not in load_recipe("qera-w4a16g64@0.25f4").describe()
    assert methods.names("tuning") == ["tune"]


@pytest.mark.parametrize("name", ["qe-paper+tune-w4a6", "serq+tune-w4a4", "masquant+tune-w4a6"])
def test_what_cannot_be_learned_is_refused_with_the_part_that_clashes(name):
    with pytest.raises(ConfigError, match=r"tune learns one adapter .* (quant_experts|salient|cross_modal)"):
        load_recipe(name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "tuning.steps must be at least 1"),
        ({"batch": 0}, "tuning.batch"),
        ({"rate": float("nan")}, "tuning.rate must be finite"),
        ({"clip_rate": -1.0}, "tuning.clip_rate"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Tune(**settings)
