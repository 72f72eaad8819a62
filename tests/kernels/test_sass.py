"""The reader of machine code finds registers that are used too early, and nothing else."""

import pytest

from tests.kernels.sass import Hazard, Instruction, hazards, main_loop, parse, product

LOOP = """
	.headerflags	@"EF_CUDA_SM90"
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDS.128 R60, [R10+UR4] ;
        /*0020*/                   LOP3.LUT R60, R60, 0xf000f, R35, 0x6a, !PT ;
        /*0030*/                   WARPGROUP.ARRIVE ;
        /*0040*/                   HGMMA.64x16x16.F32.BF16 R24, R60, gdesc[UR20], R24, gsb0 ;
        /*0050*/                   IADD3 R9, R9, 0x1, RZ ;
        /*0060*/                   WARPGROUP.DEPBAR.LE gsb0, {pending} ;
        /*0070*/               @P0 BRA `(.L_x_1) ;
        /*0080*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0090*/                   STG.E.128 desc[UR6][R2.64], R24 ;
        /*00a0*/                   EXIT ;
"""


def code(*texts: str) -> list[Instruction]:
    return parse("\n".join(f"        /*{16 * i:04x}*/    {text} ;" for i, text in enumerate(texts)))


def test_a_loop_that_waits_is_right() -> None:
    assert hazards(parse(LOOP.format(pending="0x0"))) == []


def test_a_loop_that_leaves_its_product_running_overwrites_the_operand_of_the_next_step() -> None:
    """By the load of four registers, and by what changes one of them; both one iteration later."""
    assert hazards(parse(LOOP.format(pending="0x1"))) == [
        Hazard(0x40, 0x10, "left operand", (60, 61, 62, 63), "LDS.128 R60, [R10+UR4]"),
        Hazard(0x40, 0x20, "left operand", (60,), "LOP3.LUT R60, R60, 0xf000f, R35, 0x6a, !PT"),
    ]


def test_the_main_loop_goes_from_the_label_to_the_branch() -> None:
    body = main_loop(parse(LOOP.format(pending="0x0")))
    assert (body[0].address, body[-1].address) == (0x10, 0x70)


A = "HGMMA.64x16x16.F32.BF16 R24, R60, gdesc[UR4], R24, gsb0"
B = "HGMMA.64x16x16.F32.BF16 R32, R64, gdesc[UR4], R32, gsb0"
OPEN = "HGMMA.64x16x16.F32.BF16 R24, R60, gdesc[UR4], R24"
SHARED = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24, gsb0"


@pytest.mark.parametrize(
    ("texts", "found"),
    [
        ((A, "MOV R60, R1"), ["left operand"]),
        ((A, "MOV R59, R60"), []),  # it may be read
        ((A, "@P0 MOV R63, R1"), ["left operand"]),
        ((A, "MOV R64, R1"), []),
        ((A, "LDS.64 R59, [R1]"), ["left operand"]),
        ((A, "IMAD.WIDE.U32 R59, R1, R2, RZ"), ["left operand"]),
        ((A, "LDSM.16.M88.4 R57, [R1]"), ["left operand"]),
        ((A, "SHFL.BFLY PT, R62, R1, 0x1, 0x1f"), ["left operand"]),
        ((A, "STS.128 [R60], R60"), []),
        ((A, "LDGSTS.E.BYPASS.128 [R60], desc[UR6][R62.64]"), []),
        ((A, "ISETP.GE.AND P0, PT, R60, R61, PT"), []),
        ((A, "R2UR UR4, R60"), []),
        ((A, "FADD R1, R24, R2"), ["accumulator"]),  # read
        ((A, "STG.E.64 desc[UR6][R2.64], R30"), ["accumulator"]),
        ((A, "MOV R31, R1"), ["accumulator"]),
        ((A, "MOV R32, R1"), []),
        ((A, A), []),  # the tensor core keeps their order
        ((A, "WARPGROUP.DEPBAR.LE gsb0, 0x0", "MOV R60, R24"), []),
        ((A, B, "WARPGROUP.DEPBAR.LE gsb0, 0x1", "MOV R60, R1"), []),
        ((A, B, "WARPGROUP.DEPBAR.LE gsb0, 0x1", "MOV R64, R1"), ["left operand"]),
        ((OPEN, "WARPGROUP.DEPBAR.LE gsb0, 0x0", "MOV R60, R1"), ["left operand"]),  # in no group yet
        ((OPEN, B, "WARPGROUP.DEPBAR.LE gsb0, 0x0", "MOV R60, R1"), []),
        ((SHARED, "MOV R60, R1"), []),
        ((SHARED, "MOV R55, R1"), ["accumulator"]),
    ],
    ids=str,
)
def test_what_touches_a_running_product(texts: tuple[str, ...], found: list[str]) -> None:
    assert [hazard.kind for hazard in hazards(code(*texts))] == found


def test_a_wait_on_one_of_two_paths_is_not_enough() -> None:
    listing = """
        /*0000*/                   HGMMA.64x16x16.F32.BF16 R24, R60, gdesc[UR4], R24, gsb0 ;
        /*0010*/               @P0 BRA `(.L_x_2) ;
        /*0020*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
.L_x_2:
        /*0030*/                   MOV R60, R1 ;
        /*0040*/                   EXIT ;
"""
    assert [(h.product, h.at) for h in hazards(parse(listing))] == [(0, 0x30)]
    assert hazards(parse(listing.replace("@P0 BRA", "    NOP"))) == []


def test_code_behind_the_end_is_not_reached() -> None:
    assert hazards(code(A, "EXIT", "MOV R60, R1")) == []


def test_a_product_owns_what_its_shape_says() -> None:
    (wide,) = code("IGMMA.64x128x32.S8.S8 R24, R152, gdesc[UR4], R24, gsb0")
    found = product(wide)
    assert found is not None
    assert (found.accumulator, found.left, found.commits) == (range(24, 88), range(152, 156), True)
