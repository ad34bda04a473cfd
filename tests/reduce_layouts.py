"""Find reductions that Triton before 3.8 gets wrong, in the layouts that its compiler chose.

A reduction whose axis several lanes of a warp share ends in shuffles between them. Until Triton 3.8
these take the axis' lanes for neighbours: where the layout gives the axis lanes that do not adjoin
(bits 0 and 4 of the lane's number, say), they add values of other rows, and nothing complains.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

# by construction, each axis of these has lanes that adjoin
ADJOINING_LAYOUTS = ("blocked", "nvidia_mma", "amd_mfma")

_LAYOUT = re.compile(r"^(#\w+) = #ttg\.(\w+)<\{(.*)\}>$", re.M)
# the body of a reduction holds no other; its operands' types stand behind it
_REDUCTION = re.compile(
    r'"tt\.reduce"\([^)]*\) <\{axis = (?P<axis>\d+) : i32\}> \(\{'
    r"(?:(?!tt\.reduce\"\().)*?"
    r"\}\) : \(tensor<(?P<shape>(?:\d+x)+)\w+, (?P<encoding>#.*?)>[,)]",
    re.S,
)


def scattered_reductions(ttgir: str) -> list[str]:
    """What a kernel does over an axis in lanes that do not adjoin: "sums over axis 0 of ...".

    Args:
        ttgir: a kernel's code with layouts, as a compiled kernel's ``asm["ttgir"]`` has it.
    """
    layouts = {name: (kind, body) for name, kind, body in _LAYOUT.findall(ttgir)}
    reductions = list(_REDUCTION.finditer(ttgir))
    assert len(reductions) == ttgir.count('"tt.reduce"('), "a reduction is written in a new way"
    return [
        f"sums over axis {found['axis']} of {found['shape'][:-1]} in lane bits {bits}"
        for found in reductions
        for bits in _lane_bits(layouts, int(found["axis"]), found["encoding"])
        if bits != list(range(bits[0], bits[-1] + 1))
    ]


def _lane_bits(
    layouts: dict[str, tuple[str, str]], axis: int, encoding: str
) -> Iterator[list[int]]:
    """The bits of a lane's number that choose a place along an axis, where there are any.

    ``encoding`` is the name of a layout, or slices of one: what is left of it without some axes.
    """
    *slices, name = re.findall(r"dim = \d+|(?<!#ttg\.)#(?!ttg)\w+", encoding)
    kind, body = layouts[name]
    if kind in ADJOINING_LAYOUTS:
        return
    assert kind == "linear", f"{kind} layouts are not known to this check"
    lanes = json.loads(re.search(r"lane = (\[.*?\]), warp", body)[1])
    axes = list(range(len(lanes[0]))) if lanes else []
    # the innermost slice is the first to be cut
    for cut in reversed(slices):
        axes.pop(int(cut.removeprefix("dim = ")))
    bits = [bit for bit, place in enumerate(lanes) if place[axes[axis]]]
    if bits:
        yield bits
