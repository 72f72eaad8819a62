"""What the command makes of its options and of signals, before any work."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from qe_pipelines.quantize import cost_lines, num_bytes, stopping

from qe_dist.core.errors import ConfigError
from tests.core.test_manifest import MADE


def test_sizes_are_read_as_people_write_them():
    assert [num_bytes("--memory", text) for text in ("20GiB", "500MB", "1000")] == [20 * 2**30, 500 * 10**6, 1000]
    assert num_bytes("--memory", None) is None


@pytest.mark.parametrize("text", ["much", "20 potatoes", ""])
def test_other_sizes_are_refused_by_the_name_of_the_option(text):
    with pytest.raises(ConfigError, match=rf"--host-memory must be a size like 20GiB, found '{text}'"):
        num_bytes("--host-memory", text)


def test_the_last_lines_say_what_is_executed_and_all_that_it_costs():
    manifest = replace(
        MADE, checkpoint_bytes=3 * 2**20, parameters=4 * 2**20, arithmetic="int8", bits_per_weight=4.25,
        active_bits_per_weight=4.125, macs_by_arithmetic={"a16": 0.05, "int8": 1.0},
    )  # fmt: skip
    assert list(cost_lines(manifest, Path("out"))) == [
        "wrote out: 3.0 MiB in all files, 6.00 bits per parameter of the model",
        "per quantized weight: 4.25 bits stored, 4.12 read for a token, 0.050 a16 + 1.000 int8 multiplications; "
        "its product is int8",
    ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_leaves_the_second_to_its_default(number):
    before = signal.getsignal(number)
    with stopping() as stop:
        assert not stop.is_set()
        os.kill(os.getpid(), number)
        assert stop.is_set()
        assert signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL)
    assert signal.getsignal(number) == before
