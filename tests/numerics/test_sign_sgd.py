"""Sign-SGD: what it reaches, what it keeps, and what it does where a loss is not finite."""

import itertools

import pytest
import torch
from torch import nn

from qe_dist.numerics.sign_sgd import Learned, Training, descend


def parameter(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values))


def test_steps_fall_to_zero_so_that_a_number_moves_by_half_of_rate_times_steps():
    x = parameter(0.0, 0.0)
    descend(
        [Learned(x), Learned(y := parameter(0.0), rate=3.0)],
        lambda _: x.sum() - y.sum(),
        lambda: 100 + float(x.sum()),
        50,
        1 / 50,
        1,
    )
    assert x.tolist() == pytest.approx([-0.51, -0.51])
    assert y.item() == pytest.approx(3 * 0.51)


def test_numbers_stay_within_their_bounds():
    x = parameter(0.2)
    descend([Learned(x, bounds=(-0.5, 0.5))], lambda _: -x.sum(), lambda: -float(x), 10, 1.0, 1)
    assert x.item() == 0.5


def test_the_state_with_the_least_held_out_loss_is_kept():
    """Training goes on to 10, and what is held out is best at 3."""
    x = parameter(0.0)
    descent, _ = descend([Learned(x)], lambda _: (x - 10).abs().sum(), lambda: abs(float(x) - 3), 20, 1.0, 20)
    assert descent.before == 3
    assert descent.after == pytest.approx(abs(x.item() - 3))
    assert descent.after < 0.6
    assert 0 < descent.step < 20


def test_the_start_is_kept_where_no_step_helps():
    x = parameter(2.0)
    descent, _ = descend([Learned(x)], lambda _: x.sum(), lambda: -float(x), 8, 0.1, 4)
    assert (descent.step, descent.after, x.item()) == (0, descent.before, 2.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_after_a_loss_that_is_not_finite_training_goes_on_from_the_best_state_at_half_the_rate(bad):
    x, seen = parameter(0.0), []

    def loss(step):
        seen.append(x.item())
        return (x.sum() * bad).exp() * bad if step == 4 else -x.sum()

    descent, _ = descend([Learned(x)], loss, lambda: 100 - float(x), 10, 1.0, checks=5)
    moves = [after - before for before, after in itertools.pairwise(seen)]
    assert descent.nonfinite == (4,)
    assert moves[:4] == pytest.approx([1.0, 0.9, 0.8, 0.7])
    assert moves[4] == 0.0  # the best state is that of step 4, and nothing moved since
    assert moves[5:] == pytest.approx([0.25, 0.2, 0.15, 0.1])


def test_a_start_that_is_not_finite_is_left_behind():
    x = parameter(1.0)
    descent, _ = descend(
        [Learned(x)], lambda _: -x.sum(), lambda: float("nan") if x.item() == 1.0 else -float(x), 4, 0.5, 4
    )
    assert (descent.step, descent.left) == (4, 0.0)


def test_nothing_is_trained_where_nothing_is_wrong():
    x = parameter(1.0)
    descent, _ = descend([Learned(x)], lambda _: x.sum(), lambda: 0.0, 4, 0.5, 4)
    assert (descent.step, descent.left, x.item()) == (0, 1.0, 1.0)


def test_whoever_watches_is_told_the_loss_at_each_check():
    x, told = parameter(4.0), []
    descend([Learned(x)], lambda _: x.sum(), lambda: float(x), 4, 1.0, 2, lambda *said: told.append(said))
    assert told == [(2, pytest.approx(2.25 / 4)), (4, pytest.approx(1.5 / 4))]


def test_where_nothing_is_ever_finite_the_start_is_kept():
    x = parameter(1.0)
    descent, _ = descend([Learned(x)], lambda _: x.sum() * float("nan"), lambda: float("nan"), 4, 0.5, 4)
    assert (descent.step, descent.left, descent.nonfinite, x.item()) == (0, 1.0, (0, 1, 2, 3), 1.0)


@pytest.mark.parametrize("stopped", range(1, 10))
def test_a_training_goes_on_from_any_step_with_the_same_bits(stopped):
    """Through its tensors, as they are saved. One loss is not finite, and the best state is not the last one."""

    def made(training=None, keep=lambda training: None):
        x = parameter(0.0, 0.1)
        loss = lambda step: (x - 3).abs().sum() * (float("nan") if step == 4 else 1.0)  # noqa: E731
        told = descend([Learned(x)], loss, lambda: abs(float(x[0]) - 1), 10, 0.9, 5, training=training, keep=keep)[0]
        return told, x.tolist()

    saved = {}

    def keep(training):
        saved[training.step] = {name: t.clone() for name, t in training.tensors().items()}

    whole = made(keep=keep)
    assert whole[0].nonfinite == (4,)
    assert 0 < whole[0].step < 10
    assert made(Training.from_tensors(saved[stopped])) == whole


@pytest.mark.parametrize(("optimum", "best"), [(10.0, 8), (-1.0, 0)])
def test_each_part_looks_for_the_best_state_anew_and_the_last_one_compares_it_with_the_start(optimum, best):
    """The held-out loss is another one in the second part; each part has tensors of its own, as they were at first."""
    first, second = parameter(0.0), parameter(0.0)
    _, training = descend(
        [Learned(first)], lambda _: -first.sum(), lambda: 100 + float(first), 8, 0.1, 8, part=range(4)
    )
    assert first.item() == pytest.approx(0.1 * (8 + 7 + 6 + 5) / 8), "what is not the last part restores nothing"
    told, _ = descend(
        [Learned(second)], lambda _: -second.sum(), lambda: abs(float(second) - optimum), 8, 0.1, 8,
        part=range(4, 8), training=training,
    )  # fmt: skip
    assert (told.step, told.before) == (best, abs(optimum))
    assert second.item() == pytest.approx(0.1 * 36 / 8 if best else 0.0)
