"""Faults planted in listings of machine code, which `sass` must find."""

from __future__ import annotations

import sass

# a loop that multiplies by a factor in registers, R40 to R43, as cuobjdump lists it
LISTING = """
        /*0000*/                   MOV R40, R8 ;
        /*0010*/                   WARPGROUP.ARRIVE ;
        /*0020*/                   HGMMA.64x32x16.F32.BF16 R24, R40, gdesc[UR4].tnspB, RZ, !UPT ;
        /*0030*/                   HGMMA.64x32x16.F32.BF16 R24, R44, gdesc[UR8].tnspB, R24, gsb0 ;
        /*0040*/                   IMAD.WIDE R48, R2, 0x4, R6 ;
        /*0050*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0060*/                   FMUL R24, R24, R3 ;
        /*0070*/              @!P1 BRA 0x0 ;
        /*0080*/                   EXIT ;
"""
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0 ;"


def hazards(listing: str) -> list[str]:
    return sass.hazards(sass.instructions(listing))


def test_reads_instructions():
    lines = """
        /*0010*/              @!UP0 LEA.HI R6, R3.reuse, 0xe, RZ, 0x1a &req={2} ?WAIT2_END_GROUP ;
        /*0020*/                   BRA 0x10 &req={1} ?trans5;
    """
    shift, branch = sass.instructions(lines)
    assert shift == sass.Instruction(16, "LEA.HI", ("R6", "R3", "0xe", "RZ", "0x1a"), True)
    assert shift.written == range(6, 7)
    assert branch.jumps_to == 16


def test_waits_before_it_writes():
    assert hazards(LISTING) == []


def test_writes_to_a_factor_in_flight():
    for planted in ("MOV R43, R8 ;", "LDS.128 R44, [R5] ;", "SHFL.BFLY PT, R40, R6, 0x2, 0x1f ;"):
        (found, *_) = hazards(LISTING.replace("IMAD.WIDE R48, R2, 0x4, R6 ;", planted))
        assert "at 0x40 overtakes" in found, planted
    # the second of the registers that a wide product writes
    assert hazards(LISTING.replace("IMAD.WIDE R48", "IMAD.WIDE R39"))
    # a read, a write beside them, and one that follows the wait
    for harmless in ("STS.128 [R5], R44 ;", "MOV R48, R8 ;", "ISETP.GE.AND P0, PT, R40, R6, PT ;"):
        assert not hazards(LISTING.replace("IMAD.WIDE R48, R2, 0x4, R6 ;", harmless)), harmless


def test_writes_to_a_result_in_flight():
    assert hazards(LISTING.replace("IMAD.WIDE R48", "IMAD.WIDE R38"))
    # another product into the same registers follows in its order, one that overlaps does not
    second = "HGMMA.64x32x16.F32.BF16 R24, R44"
    assert hazards(LISTING.replace(second, "HGMMA.64x32x16.F32.BF16 R32, R48"))


def test_follows_loops_to_their_start():
    # without the wait, and with one that lets a group go on: the next round's MOV comes too early
    for wait in ("NOP ;", "WARPGROUP.DEPBAR.LE gsb0, 0x1 ;"):
        found = hazards(LISTING.replace(WAIT, wait).replace("FMUL R24", "FMUL R60"))
        assert any("MOV at 0x0 overtakes 0x20" in hazard for hazard in found), wait


def test_counts_the_copies_in_flight():
    def loop(*body: str) -> list[sass.Instruction]:
        padding = ["NOP"] * 70
        lines = [*body, *padding, "@P0 BRA 0x0"]
        return sass.instructions(
            "\n".join(f"        /*{16 * n:04x}*/   {line} ;" for n, line in enumerate(lines))
        )

    copy, product = ("LDGSTS.E.128 [R4], desc[UR8][R2.64]", "LDGDEPBAR"), "HMMA R4, R8, R2, R4"
    assert sass.copies_in_flight(loop("DEPBAR.LE SB0, 0x1", product, *copy)) == 1
    assert sass.copies_in_flight(loop("DEPBAR.LE SB0, 0x0", *copy, product)) == 1
    # every copy is waited for before the product, or issued after it
    assert sass.copies_in_flight(loop("DEPBAR.LE SB0, 0x0", product, *copy)) == 0
    assert sass.copies_in_flight(loop(*copy, "DEPBAR.LE SB0, 0x0", product)) == 0
    assert sass.copies_in_flight(loop(product)) == 0
    # no loop is left: what counts is that there are copies left to wait for at its first turn
    written_out = [*copy, *copy, "DEPBAR.LE SB0, 0x1", product, "DEPBAR.LE SB0, 0x0", product]
    assert sass.copies_in_flight(loop(*written_out)[: len(written_out)]) == 1
    waiting = [line.replace("0x1", "0x0") for line in written_out]
    assert sass.copies_in_flight(loop(*waiting)[: len(waiting)]) == 0
