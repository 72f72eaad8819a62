"""Device layouts: a permutation of the checkpoint's codes that fits the tensor cores' fragments, and its inverse."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from qe_kernels import layout
from qe_kernels.layout import Order, field_widths, order_for, pack_weight, unpack_weight

from qe_dist.numerics.packing import pack

BITS = st.integers(2, 8)
ORDERS = st.sampled_from(Order)


def random_codes(rows, columns, bits, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, columns), generator=generator, dtype=torch.int8)


def packed(codes, bits, order=Order.NATURAL, int8=False, **kwargs):
    return pack_weight(pack(codes, bits), bits, torch.ones(len(codes), 1), codes.shape[1], order, int8, **kwargs)


def words_of(weight, row):
    """The 32-bit words that hold a row of a matrix of one tile."""
    (plane,) = weight.planes
    return plane[0, 0, row].view(torch.int32).tolist()


@given(rows=st.integers(1, 200), columns=st.integers(1, 400), bits=BITS, order=ORDERS, int8=st.booleans())
def test_unpacking_inverts_packing(rows, columns, bits, order, int8):
    codes = random_codes(rows, columns, bits)
    weight = packed(codes, bits, order, int8)
    assert torch.equal(unpack_weight(weight)[0], codes)
    assert (weight.row_tiles, weight.column_tiles) == (-(-rows // 64), -(-columns // 128))
    assert [p.shape for p in weight.planes] == [
        (weight.row_tiles, weight.column_tiles, 64, 16 * w) for w in field_widths(bits)
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("group_size", [32, 64, 128, None])
def test_scales_are_transposed(dtype, group_size, normal):
    scale = normal(0, 70, 256 // group_size if group_size else 1).to(dtype)
    words = pack(random_codes(70, 256, 4), 4)
    weight = pack_weight(words, 4, scale, 256, Order.WGMMA, group_size=group_size)
    assert torch.equal(weight.scale, scale.t())
    assert weight.scale.is_contiguous()
    assert torch.equal(unpack_weight(weight)[1], scale)


@pytest.mark.parametrize("bits", range(2, 9))
def test_stores_no_bit_more_than_the_checkpoint(bits):
    codes = random_codes(128, 256, bits)
    assert sum(p.numel() for p in packed(codes, bits).planes) == pack(codes, bits).numel() * 4


@pytest.mark.parametrize("order", Order)
@pytest.mark.parametrize("bits", range(2, 9))
def test_padding_holds_code_zero(bits, order):
    """So it adds nothing to a product, and a kernel needs no mask."""
    weight = packed(random_codes(3, 5, bits), bits, order)
    whole = layout.Weight(weight.planes, torch.ones(1, 64), 64, 128, bits, None, order, False)
    codes = unpack_weight(whole)[0]
    assert codes[:3, :5].any()
    assert not codes[3:].any()
    assert not codes[:, 5:].any()


@given(bits=BITS, order=ORDERS, int8=st.booleans(), byte=st.integers(0, 255), row=st.integers(0, 127))
def test_a_tile_is_contiguous_and_holds_its_own_codes_only(bits, order, int8, byte, row):
    """Changing byte i of a row of a plane changes codes of that row and that tile only."""
    weight = packed(torch.zeros(128, 256, dtype=torch.int8), bits, order, int8)
    plane = weight.planes[0]
    tile, run = byte % 2, byte % plane.shape[3]
    plane.view(-1)[((row // 64 * 2 + tile) * 64 + row % 64) * plane.shape[3] + run] = 0xFF
    changed = unpack_weight(weight)[0].nonzero()
    assert len(changed) == 8 // field_widths(bits)[0]
    assert changed[:, 0].unique().tolist() == [row]
    assert (changed[:, 1] // 128).unique().tolist() == [tile]


@pytest.mark.parametrize(
    ("int8", "columns"), [(False, [0, 2, 4, 6, 1, 3, 5, 7]), (True, [0, 4, 1, 5, 2, 6, 3, 7])], ids=["16-bit", "int8"]
)
def test_nibbles_of_a_word_in_natural_order(int8, columns):
    codes = random_codes(1, 128, 4)
    for word, value in enumerate(words_of(packed(codes, 4, Order.NATURAL, int8), 0)):
        assert [(value >> 4 * i) & 15 for i in range(8)] == [codes[0, 8 * word + c].item() & 15 for c in columns]


def test_wgmma_order_gives_each_thread_its_fragments_of_16_bits():
    """PTX, wgmma.m64nNk16: of 16 columns, thread c of a quad holds 2c, 2c + 1 and 2c + 8, 2c + 9, a register each.
    Its four words, each shifted by 0, 4, 8, 12 and masked, must be these registers for the eight steps of 128 columns.
    """
    codes = random_codes(1, 128, 4)
    words = words_of(packed(codes, 4, Order.WGMMA), 0)
    for c in range(4):
        registers = [(w >> 4 * i) & 0x000F000F for w in words[4 * c : 4 * c + 4] for i in range(4)]
        columns = [16 * step + 8 * half + 2 * c for step in range(8) for half in range(2)]
        assert [(r & 15, r >> 16) for r in registers] == [
            (codes[0, k].item() & 15, codes[0, k + 1].item() & 15) for k in columns
        ]


def test_wgmma_order_gives_each_thread_its_fragments_of_int8():
    """PTX, wgmma.m64nNk32: of 32 columns, thread c of a quad holds 4c .. 4c + 3 and 4c + 16 .. 4c + 19."""
    codes = random_codes(1, 128, 4)
    words = words_of(packed(codes, 4, Order.WGMMA, int8=True), 0)
    for c in range(4):
        registers = [(w >> 4 * i) & 0x0F0F0F0F for w in words[4 * c : 4 * c + 4] for i in range(2)]
        columns = [32 * step + 16 * half + 4 * c for step in range(4) for half in range(2)]
        assert [list(r.to_bytes(4, "little")) for r in registers] == [
            [codes[0, k + j].item() & 15 for j in range(4)] for k in columns
        ]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_in_place_reuses_the_memory_of_the_words(bits):
    codes = random_codes(192, 256, bits)
    words = pack(codes, bits)
    weight = pack_weight(words, bits, torch.ones(192, 1), 256, Order.WGMMA, in_place=True)
    assert weight.planes[0].data_ptr() == words.data_ptr()
    assert torch.equal(unpack_weight(weight)[0], codes)


@pytest.mark.parametrize(("bits", "rows", "columns"), [(3, 64, 128), (4, 65, 128), (4, 64, 136)])
def test_in_place_leaves_the_words_alone_where_the_plane_does_not_fit(bits, rows, columns):
    codes = random_codes(rows, columns, bits)
    words = pack(codes, bits)
    weight = pack_weight(words, bits, torch.ones(rows, 1), columns, Order.WGMMA, in_place=True)
    assert torch.equal(words, pack(codes, bits))
    assert torch.equal(unpack_weight(weight)[0], codes)


def test_in_place_leaves_the_neighbours_of_a_shard_alone():
    """A row-parallel shard is a view with gaps: other ranks' words lie in them."""
    codes = random_codes(64, 256, 4)
    words = pack(codes, 4)
    weight = pack_weight(words.chunk(2, dim=1)[1], 4, torch.ones(64, 1), 128, Order.WGMMA, in_place=True)
    assert torch.equal(words, pack(codes, 4))
    assert torch.equal(unpack_weight(weight)[0], codes[:, 128:])


def test_without_in_place_the_words_stay():
    words = pack(random_codes(64, 128, 4), 4)
    before = words.clone()
    pack_weight(words, 4, torch.ones(64, 1), 128, Order.WGMMA)
    assert torch.equal(words, before)


@pytest.mark.parametrize("in_place", [False, True])
def test_large_matrices_are_repacked_slab_by_slab(in_place, monkeypatch):
    codes = random_codes(320, 256, 4)
    whole = packed(codes, 4, Order.WGMMA)
    monkeypatch.setattr(layout, "_SLAB_CODES", 2 * 64 * 256)
    parts = packed(codes, 4, Order.WGMMA, in_place=in_place)
    assert torch.equal(whole.planes[0], parts.planes[0])
    assert torch.equal(unpack_weight(parts)[0], codes)


@pytest.mark.parametrize("bits", range(2, 9))
def test_shards_of_tensor_parallelism(bits):
    """Words of a column-parallel shard are rows, those of a row-parallel one columns, of the whole matrix's words."""
    codes = random_codes(120, 256, bits)
    words = pack(codes, bits)
    for rank in range(2):
        rows = pack_weight(words.chunk(2)[rank], bits, torch.ones(60, 1), 256, Order.WGMMA)
        columns = pack_weight(words.chunk(2, dim=1)[rank], bits, torch.ones(120, 1), 128, Order.WGMMA)
        assert torch.equal(unpack_weight(rows)[0], codes.chunk(2)[rank])
        assert torch.equal(unpack_weight(columns)[0], codes.chunk(2, dim=1)[rank])


def test_no_rows():
    weight = pack_weight(torch.empty(0, 16, dtype=torch.int32), 4, torch.ones(0, 1), 128, Order.NATURAL)
    assert unpack_weight(weight)[0].shape == (0, 128)


@pytest.mark.parametrize("version", ["3.6.0", "3.9.0+git1"])
def test_hopper_reads_its_fragments(version, monkeypatch):
    monkeypatch.setattr("triton.__version__", version)
    assert order_for((9, 0)) is Order.WGMMA


@pytest.mark.parametrize(("version", "order"), [("3.6.0", "natural"), ("3.9.0", "wgmma"), ("3.10.1+git1", "wgmma")])
@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9)])
def test_the_order_of_ampere_depends_on_triton(capability, version, order, monkeypatch):
    monkeypatch.setattr("triton.__version__", version)
    assert order_for(capability) == order


def test_order_of_the_cpu():
    assert order_for(torch.device("cpu")) is Order.NATURAL


@pytest.mark.parametrize("capability", [(7, 5), (10, 0), (12, 0)])
def test_refuses_unknown_gpus(capability):
    with pytest.raises(ValueError, match=rf"device: .*found {capability[0]}\.{capability[1]}"):
        order_for(capability)


WORDS = torch.zeros(64, 32, dtype=torch.int32)
SCALE = torch.ones(64, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 1}, "bits: expected 2 to 8, found 1"),
        ({"words": WORDS.long()}, "words: expected int32"),
        ({"words": WORDS[:, 1:]}, r"words: expected int32 \[rows, 32\] .* found torch.int32 \[64, 31\]"),
        ({"words": WORDS[0]}, "words: expected int32"),
        ({"words": WORDS.t().contiguous().t()}, "words: expected contiguous rows, found strides"),
        ({"scale": SCALE[:, :1]}, r"scale: expected .* \[64, 2\], found torch.float32 \[64, 1\]"),
        ({"scale": SCALE.double()}, "scale: expected .* found torch.float64"),
        ({"scale": SCALE.to("meta")}, "scale: expected on cpu like the words, found on meta"),
        ({"group_size": 100}, "group_size: expected a divisor of 256 columns, found 100"),
    ],
)
def test_refuses_what_does_not_fit(change, message):
    good = {"words": WORDS, "bits": 4, "scale": SCALE, "columns": 256, "order": Order.NATURAL, "group_size": 128}
    pack_weight(**good)
    with pytest.raises(ValueError, match=message):
        pack_weight(**good | change)
