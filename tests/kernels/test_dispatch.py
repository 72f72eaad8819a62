"""Which tiles are chosen: from a table where one has an answer, else by a rule that always gives legal ones."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from qe_kernels import Order, Weight, dispatch, order_for
from qe_kernels.dispatch import BUCKETS, CAPABILITIES, Device, bucket_of, choose, depths, heuristic, key_of
from qe_kernels.layout import field_widths
from qe_kernels.linear import Config
from qe_kernels.workspaces import FLOATS, TILES

from tests.kernels.hopper import H100, weight
from tests.kernels.test_aot_linear import CASES

CONFIG = Config(64, 16, 128, split_k=2)


QKV, O, GATE_UP, DOWN = (
    weight(*size, group_size=128) for size in ((10240, 8192), (8192, 8192), (59136, 8192), (8192, 29568))
)


@pytest.mark.parametrize(
    ("tokens", "bucket"), [(0, 1), (1, 1), (2, 16), (16, 16), (17, 32), (4095, 4096), (4096, 4096), (100_000, 4096)]
)
def test_a_bucket_holds_all_tokens_up_to_it(tokens: int, bucket: int) -> None:
    assert bucket_of(tokens) == bucket


@pytest.mark.parametrize(
    ("of", "key"),
    [
        (QKV, "w4a16g128 10240x8192"),
        (weight(64, 128, int8=True), "w4a8 64x128"),
        (weight(64, 128, bits=3, group_size=32), "w3a16g32 64x128"),
    ],
)
def test_the_key_says_kind_and_shape(of: Weight, key: str) -> None:
    assert key_of(of) == key


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = {key_of(QKV): {16: CONFIG, 4096: None, 64: None}}
    monkeypatch.setattr(dispatch, "table_of", lambda name: measured if name == H100.name else {})


@pytest.mark.usefixtures("table")
def test_a_table_decides_for_its_device_shape_and_buckets_only() -> None:
    assert choose(H100, QKV, 9) == CONFIG
    assert choose(H100, QKV, 33) is None
    assert choose(H100, QKV, 5000) is None
    assert choose(H100, QKV, 1) == heuristic(H100, QKV, 1)
    assert choose(H100, O, 9) == heuristic(H100, O, 9)
    assert choose(H100, replace(QKV, int8=True), 9) == heuristic(H100, replace(QKV, int8=True), 9)
    assert choose(replace(H100, name="another"), QKV, 33) == heuristic(H100, QKV, 33)


def test_a_table_goes_to_its_file_and_back() -> None:
    before = {key_of(QKV): {1: CONFIG, 4096: None}, key_of(O): {16: replace(CONFIG, scale_weights=True)}}
    content = json.loads(json.dumps({"linears": dispatch.written_table(before)}))
    assert dispatch.read_table(content) == before


def test_tables_in_the_wheel_are_read(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tables").mkdir()
    written = {"linears": dispatch.written_table({key_of(QKV): {16: CONFIG}})}
    path = tmp_path / "tables" / "nvidia-h100-80gb-hbm3.json"
    path.write_text(json.dumps(written), encoding="utf-8")
    monkeypatch.setattr(dispatch, "files", lambda package: tmp_path)
    monkeypatch.setattr(dispatch, "table_of", dispatch.table_of.__wrapped__)
    assert choose(H100, QKV, 16) == CONFIG
    assert dispatch.table_of("a device that nobody measured") == {}


def test_every_table_that_is_shipped_can_be_read() -> None:
    for path in dispatch.files("qe_kernels").joinpath("tables").iterdir():
        if path.name.endswith(".json"):
            content = json.loads(path.read_text(encoding="utf-8"))
            assert path.name == dispatch.file_name(content["device"])
            assert all(bucket in BUCKETS for row in dispatch.read_table(content).values() for bucket in row)


@pytest.mark.parametrize(("of", "split"), [(QKV, 4), (O, 8), (GATE_UP, 1), (DOWN, 8)])
def test_few_tokens_split_k_until_the_gpu_is_full(of: Weight, split: int) -> None:
    """As docs/how/kernels.md says; but a tile of several tokens is wider, for x."""
    for tokens, outputs in ((1, 64), (16, 128)):
        config = heuristic(H100, of, tokens)
        assert config is not None
        assert (config.BN, config.BM, config.BK, config.split_k) == (outputs, 16, 128, split)


def test_many_tokens_are_multiplied_by_cublas_unless_integers_are_faster() -> None:
    assert heuristic(H100, QKV, 512) is not None
    assert heuristic(H100, QKV, 1024) is not None
    assert heuristic(H100, QKV, 1025) is None
    assert heuristic(H100, weight(10240, 8192, int8=True), 4096) is not None


@given(
    capability=st.sampled_from(CAPABILITIES),
    rows=st.integers(1, 60000),
    groups=st.integers(1, 300),
    group_size=st.sampled_from((None, 8, 16, 24, 32, 64, 96, 128, 256)),
    bits=st.integers(2, 8),
    int8=st.booleans(),
    tokens=st.integers(1, 10000),
)
def test_the_rule_gives_tiles_that_the_kernel_can_run(capability, rows, groups, group_size, bits, int8, tokens) -> None:
    device = replace(H100, capability=capability)
    of = replace(weight(rows, groups * (group_size or 100), bits, group_size, int8), order=order_for(capability))
    if not depths(of):
        assert group_size in (24, 96)
        return
    config = heuristic(device, of, tokens)
    if config is None:
        assert (tokens > 1024 and not int8) or (int8 and group_size is not None)
        return
    assert config.BM >= 16
    assert config.BK * field_widths(bits)[-1] >= 128 or of.order is Order.NATURAL
    assert config.BK in (32, 64, 128)
    if group_size is not None:
        assert group_size % config.BK == 0 or (config.BK % group_size == 0 and not int8)
    tiles = -(-rows // config.BN) * -(-tokens // config.BM)
    if config.split_k > 1:
        assert tiles <= TILES
        assert tiles * (config.split_k + 1) * config.BN * config.BM <= FLOATS


@pytest.mark.parametrize("tokens", [1, 32, 64, 256, 1000])
@pytest.mark.parametrize("of", [QKV, DOWN, weight(10240, 8192, int8=True)], ids=key_of)
def test_the_tiles_of_hopper_are_built_ahead_of_time(of: Weight, tokens: int) -> None:
    """So that they are known to fit and not to spill."""
    config = heuristic(H100, of, tokens)
    assert config is not None
    assert tile(config) in {tile(case.config) for case in CASES if case.capability == 90 and (of.int8 or not case.int8)}


def tile(config: Config) -> tuple[int, ...]:
    return config.BN, config.BM, config.BK, config.warps, config.stages


def test_a_cpu_is_no_device_of_the_kernels() -> None:
    assert dispatch.device_of(torch.device("cpu")) is None


@pytest.mark.parametrize(("capability", "known"), [((9, 0), True), ((8, 9), True), ((7, 5), False), ((10, 0), False)])
def test_only_known_architectures_run_the_kernels(capability, known, monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        name, multi_processor_count = "some GPU", 100
        major, minor = capability

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    found = dispatch.device_of.__wrapped__(torch.device("cuda", 0))
    assert found == (Device("some GPU", capability, 100) if known else None)
