"""What NVIDIA's machine code says of a kernel: its loops, and the order in which it does things.

Read off the disassembly (SASS) of compiled kernels, so no GPU is needed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

PRODUCTS = ("HMMA", "HGMMA", "UTCHMMA")
# Instructions write what stands first; these may name a predicate before it, or write no register.
WRITE_PREDICATE_FIRST = ("SHFL", "LOP3", "ATOM", "ATOMG", "ATOMS")
WRITE_NO_REGISTER = ("BAR", "BRA", "BRX", "CALL", "JMX", "R2P", "RET", "WARPSYNC")

# More groups of products than are ever under way at once: ways that meet no wait end here.
MOST_GROUPS = 8


@dataclass(frozen=True)
class Instruction:
    address: int
    opcode: str  # with its modifiers, without its predicate: "LDG.E.128"
    operands: tuple[str, ...]
    predicated: bool = False

    @property
    def family(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def jumps_to(self) -> int | None:
        if self.family not in ("BRA", "CALL"):
            return None
        return int(self.operands[-1], 16)

    @property
    def written(self) -> range:
        """The registers of threads that it writes; too many rather than too few."""
        modifiers = self.opcode.split(".")[1:]
        operands = self.operands
        if self.family in WRITE_PREDICATE_FIRST and re.fullmatch(r"U?P(\d|T)", operands[0]):
            operands = operands[1:]
        number = re.fullmatch(r"R(\d+)", operands[0]) if operands else None
        if not number or self.family in WRITE_NO_REGISTER:
            return range(0)
        count = 1
        if self.family == "HGMMA":
            count = int(modifiers[0].split("x")[1]) // (2 if "F32" in modifiers else 4)
        elif self.family == "HMMA" or "128" in modifiers:
            count = 4
        elif self.family == "LDSM":
            count = int(modifiers[-1])
        elif self.family == "CS2R" or {"64", "WIDE", "F64"} & set(modifiers):
            count = 2
        return range(int(number[1]), int(number[1]) + count)


def instructions(listing: str) -> list[Instruction]:
    """The instructions of a kernel that ``cuobjdump -sass`` lists."""
    line = r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.\w+)*)([^;]*);"
    found = []
    for address, predicate, opcode, text in re.findall(line, listing, re.M):
        # some architectures' are followed by what they wait for: "&req={2} ?trans5"
        text = re.sub(r"\s[&?].*|\.reuse", "", text).strip()
        operands = tuple(operand.strip() for operand in text.split(",")) if text else ()
        found.append(Instruction(int(address, 16), opcode, operands, bool(predicate)))
    return found


def loops(code: list[Instruction]) -> list[list[Instruction]]:
    """The code between branches backwards and their targets; a wait spins on a few lines."""
    ends = [(i.jumps_to, i.address) for i in code if i.family == "BRA"]
    long = [(first, last) for first, last in ends if last - first > 64 * 16]
    return [[i for i in code if first <= i.address <= last] for first, last in long]


def copies_in_flight(code: list[Instruction]) -> int:
    """The least number of groups of copies to shared memory under way during a loop's products.

    Of the longest loop, once it runs: 0 where the products wait for every copy issued before them.
    Where the compiler has written out every turn of it, those under way at the first product.
    """
    body, turns = max(loops(code), key=len, default=[]), 2
    if not any(instruction.family in PRODUCTS for instruction in body):
        first = next((n for n, i in enumerate(code) if i.family in PRODUCTS), -1)
        body, turns = code[: first + 1], 1
    pending, least = 0, []
    for _ in range(turns):
        least = []
        for instruction in body:
            if instruction.family == "LDGDEPBAR":
                pending += 1
            elif instruction.opcode == "DEPBAR.LE" and instruction.operands[0] == "SB0":
                pending = min(pending, int(instruction.operands[1], 16))
            elif instruction.family in PRODUCTS:
                least.append(pending)
    return min(least, default=0)


def hazards(code: list[Instruction]) -> list[str]:
    """Writes to registers that an asynchronous product (HGMMA) reads or adds to, before its wait.

    Every way from a product to the wait that covers it is followed, around loops as well.
    """
    index = {instruction.address: n for n, instruction in enumerate(code)}
    found = []
    for start, product in enumerate(code):
        if product.family != "HGMMA":
            continue
        result = product.written
        # a left factor in registers has 64 x 32 bytes: 4 registers of each of 128 threads
        left = re.fullmatch(r"R(\d+)", product.operands[1])
        factor = range(int(left[1]), int(left[1]) + 4) if left else range(0)
        # instruction, and how many groups of products were closed since, this one's not counted
        ways, seen = [(start + 1, -1 + ("gsb0" in product.operands))], set()
        while ways:
            here, later = ways.pop()
            if here >= len(code) or (here, later) in seen:
                continue
            seen.add((here, later))
            other = code[here]
            if other.opcode.startswith("WARPGROUP.DEPBAR") and later >= int(other.operands[1], 16):
                continue
            written = set(other.written)
            # products of one group are added to one result in their order
            if other.family == "HGMMA" and other.written == result:
                written -= set(result)
            if written & {*result, *factor}:
                found.append(f"{other.opcode} at {other.address:#x} overtakes {product.address:#x}")
            if other.family == "HGMMA" and "gsb0" in other.operands:
                later = min(later + 1, MOST_GROUPS)
            if other.jumps_to is not None:
                ways.append((index[other.jumps_to], later))
            if other.family not in ("BRA", "EXIT", "RET") or other.predicated:
                ways.append((here + 1, later))
    return found
