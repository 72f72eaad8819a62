"""Weights as the kernels read them: a permutation of the checkpoint's codes, made at load, and its inverse.

A checkpoint stores the code k of a row, plus 2^(b-1), as bits k*b .. k*b + b-1 of the row's bit string, in int32 words.
On the device a code is a two's complement number of b bits, cut into *fields* of 8, 4, 2 and 1 bits, its binary
expansion (7 bits: the lowest 4, then 2, then the highest). Fields of one width form a *plane*, uint8
[N/64, K/128, 64, 16 * width]: rows are padded to 64 and columns to 128 with code 0, which is all zeros, and a tile of
64 x 128 codes lies in contiguous bytes, one run of `16 * width` bytes a row.

Within these runs the columns are ordered such that unpacking needs no exchange between threads:
 1. Order.WGMMA only: thread c of a quad holds, of every 8 columns of a 16-bit fragment, columns 2c and 2c + 1; of every
    16 columns of an int8 fragment, columns 4c .. 4c + 3. Columns [t, c, j] are stored as [c, t, j], so that its 32
    columns are one contiguous quarter of the run.
 2. A 32-bit register holds L values, 2 of 16 bits or 4 of 8 bits, so each 32-bit word of a plane is cut into L units,
    and unit l holds, lowest bits first, columns l, L + l, 2L + l ... of the word: one shift and one mask make L values.
    The nibbles of a word hold columns 0 2 4 6 1 3 5 7 for 16-bit tensor cores, and 0 4 1 5 2 6 3 7 for int8.
"""

from dataclasses import dataclass
from enum import StrEnum
from functools import reduce

import torch
from torch import Tensor
from torch.nn.functional import pad

TILE_ROWS = 64
TILE_COLUMNS = 128
_SLAB_CODES = 2**24
"""Codes that are repacked at a time: bounds the scratch memory to some hundred MiB."""


class Order(StrEnum):
    """How the columns lie in a plane. A kernel of one order reads garbage from a layout of the other."""

    WGMMA = "wgmma"
    """The order of Hopper's fragments and, since Triton 3.9, of Ampere's and Ada's, too."""
    NATURAL = "natural"
    """Before 3.9, Triton gave a thread of Ampere or Ada more neighbouring columns if its loads were narrow."""


@dataclass(frozen=True)
class Weight:
    """A quantized matrix [rows, columns] in device layout."""

    planes: tuple[Tensor, ...]
    """uint8 [row tiles, column tiles, 64, 16 * width], one for each of `field_widths(bits)`."""
    scale: Tensor
    """[groups, rows]: transposed, so that a kernel's tile of rows is contiguous."""
    rows: int
    columns: int
    bits: int
    group_size: int | None
    """Columns that share a scale; None: all."""
    order: Order
    int8: bool
    """Whether it is laid out for the int8 tensor cores; else for those of 16 bits."""

    @property
    def row_tiles(self) -> int:
        return self.planes[0].shape[0]

    @property
    def column_tiles(self) -> int:
        return self.planes[0].shape[1]

    @property
    def three_planes(self) -> tuple[Tensor, Tensor, Tensor]:
        """What `load_weight` wants; planes that the format lacks are never read, and stand for by the first."""
        first, second, third = (*self.planes, *self.planes[:1] * (3 - len(self.planes)))
        return first, second, third


def order_for(device: torch.device | tuple[int, int]) -> Order:
    """The order that kernels on a device, or of a compute capability, read. On the CPU, NATURAL.

    Raises ValueError for a GPU that the kernels do not know.
    """
    if isinstance(device, torch.device):
        if device.type == "cpu":
            return Order.NATURAL
        device = torch.cuda.get_device_capability(device)
    match device:
        case (9, 0):
            return Order.WGMMA
        case (8, _):
            return Order.WGMMA if _triton_version() >= (3, 9) else Order.NATURAL
    raise ValueError(f"device: expected compute capability 8.x or 9.0, found {device[0]}.{device[1]}")


def _triton_version() -> tuple[int, ...]:
    import triton  # not above: layouts are made and read without it, too

    return tuple(int(part) for part in triton.__version__.split(".")[:2])


def field_widths(bits: int) -> tuple[int, ...]:
    """The widths of the planes that store `bits`, lowest bits first: 3 -> (2, 1), 4 -> (4,), 7 -> (4, 2, 1)."""
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def code_factor(bits: int, int8: bool) -> int:
    """What `load_weight` multiplies a code by. In int8 the code stays in the highest bits of its byte, which saves
    the arithmetic shift; its user divides the scale by this power of two."""
    return 2 ** (8 - bits) if int8 else 1


def pack_weight(
    words: Tensor,
    bits: int,
    scale: Tensor,
    columns: int,
    order: Order,
    int8: bool = False,
    group_size: int | None = None,
    *,
    in_place: bool = False,
) -> Weight:
    """Checkpoint order to device layout, after tensor-parallel sharding, on the device where `words` lie.

    words: int32 [N, ceil(columns * bits / 32)], may be a view of a larger matrix; scale: [N, groups].
    in_place: the plane takes the memory of `words`, whose content is lost. Ignored where it does not fit: several
    planes, padding, or words that are a view with gaps.
    Raises ValueError, naming the tensor, if dtypes or shapes do not fit.
    """
    _check(words, bits, scale, columns, group_size)
    rows = words.shape[0]
    tiles = -(-rows // TILE_ROWS), -(-columns // TILE_COLUMNS)
    widths = field_widths(bits)
    shapes = [(*tiles, TILE_ROWS, TILE_COLUMNS // 8 * width) for width in widths]
    whole_tiles = rows % TILE_ROWS == columns % TILE_COLUMNS == 0
    fits = len(widths) == 1 and whole_tiles and words.is_contiguous()
    planes: tuple[Tensor, ...]
    if in_place and fits:
        planes = (words.view(torch.uint8).view(shapes[0]),)
    else:
        planes = tuple(torch.empty(shape, dtype=torch.uint8, device=words.device) for shape in shapes)
    step = _tiles_per_slab(tiles[1])
    for first in range(0, tiles[0], step):
        slab = words[first * TILE_ROWS : (first + step) * TILE_ROWS]
        codes = _to_tiles(_read_codes(slab, bits, columns))
        for plane, (low, width) in zip(planes, _fields(bits), strict=True):
            field = (codes >> low) & (2**width - 1)
            plane[first : first + step] = _join(field[..., _stored_columns(order, int8, width, words.device)], width)
    return Weight(planes, scale.t().contiguous(), rows, columns, bits, group_size, order, int8)


def unpack_weight(weight: Weight) -> tuple[Tensor, Tensor]:
    """The exact inverse: codes int8 [N, K] and scale [N, groups]."""
    bits, rows, columns = weight.bits, weight.rows, weight.columns
    codes = torch.empty(rows, columns, dtype=torch.int8, device=weight.planes[0].device)
    step = _tiles_per_slab(weight.column_tiles)
    for first in range(0, weight.row_tiles, step):
        fields = []
        for plane, (low, width) in zip(weight.planes, _fields(bits), strict=True):
            stored = _stored_columns(weight.order, weight.int8, width, plane.device)
            fields.append(_split(plane[first : first + step], width)[..., stored.argsort()] << low)
        slab = reduce(torch.bitwise_or, fields).transpose(1, 2).flatten(2).flatten(0, 1)
        slab = (slab << (8 - bits)).view(torch.int8) >> (8 - bits)
        target = codes[first * TILE_ROWS : (first + step) * TILE_ROWS]
        target.copy_(slab[: len(target), :columns])
    return codes, weight.scale.t().contiguous()


def _check(words: Tensor, bits: int, scale: Tensor, columns: int, group_size: int | None) -> None:
    if not 2 <= bits <= 8:
        raise ValueError(f"bits: expected 2 to 8, found {bits}")
    if group_size is not None and (group_size < 1 or columns % group_size):
        raise ValueError(f"group_size: expected a divisor of {columns} columns, found {group_size}")
    width = -(-columns * bits // 32)
    if words.dtype != torch.int32 or words.dim() != 2 or words.shape[1] != width:
        raise ValueError(
            f"words: expected int32 [rows, {width}] for {columns} columns of {bits} bits, "
            f"found {words.dtype} {list(words.shape)}"
        )
    if words.stride(1) != 1:
        raise ValueError(f"words: expected contiguous rows, found strides {words.stride()}")
    shape = (words.shape[0], 1 if group_size is None else columns // group_size)
    if scale.dtype not in (torch.bfloat16, torch.float16, torch.float32) or scale.shape != shape:
        raise ValueError(
            f"scale: expected bfloat16, float16 or float32 {list(shape)}, found {scale.dtype} {list(scale.shape)}"
        )
    if scale.device != words.device:
        raise ValueError(f"scale: expected on {words.device} like the words, found on {scale.device}")


def _tiles_per_slab(column_tiles: int) -> int:
    return max(1, _SLAB_CODES // (column_tiles * TILE_ROWS * TILE_COLUMNS))


def _fields(bits: int) -> list[tuple[int, int]]:
    """(lowest bit, width) of the field in each plane."""
    widths = field_widths(bits)
    return [(sum(widths[:i]), width) for i, width in enumerate(widths)]


def _stored_columns(order: Order, int8: bool, width: int, device: torch.device) -> Tensor:
    """int64 [128]: the column of a tile that each field of a run holds, in the order of their bits."""
    lanes = 4 if int8 else 2
    columns = torch.arange(TILE_COLUMNS, device=device)
    if order is Order.WGMMA:
        columns = columns.view(-1, 4, lanes).transpose(0, 1).flatten()
    return columns.view(-1, 32 // (lanes * width), lanes).transpose(1, 2).flatten()


def _read_codes(words: Tensor, bits: int, columns: int) -> Tensor:
    """uint8 [rows, columns]: two's complement of `bits` bits. Eight codes fill `bits` whole bytes."""
    string = words.view(torch.uint8)  # little endian: byte n of a row is its bits 8n .. 8n + 7
    groups = pad(string, (0, -string.shape[1] % bits)).unflatten(1, (-1, bits))
    codes = torch.empty(*groups.shape[:2], 8, dtype=torch.uint8, device=words.device)
    for lane in range(8):
        byte, shift = divmod(lane * bits, 8)
        code = groups[..., byte] >> shift
        if shift + bits > 8:
            code |= groups[..., byte + 1] << (8 - shift)
        codes[..., lane] = (code & (2**bits - 1)) ^ 2 ** (bits - 1)
    return codes.flatten(1)[:, :columns]


def _to_tiles(codes: Tensor) -> Tensor:
    """[rows, columns] -> [row tiles, column tiles, 64, 128], padded with zeros."""
    rows, columns = codes.shape
    padded = pad(codes, (0, -columns % TILE_COLUMNS, 0, -rows % TILE_ROWS))
    return padded.unflatten(1, (-1, TILE_COLUMNS)).unflatten(0, (-1, TILE_ROWS)).transpose(1, 2)


def _join(fields: Tensor, width: int) -> Tensor:
    """uint8 [..., 128] of `width` bits each -> bytes [..., 16 * width], the first field in the lowest bits."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=fields.device)
    return (fields.unflatten(-1, (-1, 8 // width)) << shifts).sum(-1, dtype=torch.uint8)


def _split(packed: Tensor, width: int) -> Tensor:
    """The inverse of `_join`."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)
    return ((packed[..., None] >> shifts) & (2**width - 1)).flatten(-2)
