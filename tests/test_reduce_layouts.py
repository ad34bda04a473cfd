"""What Triton before 3.8 sums wrongly is found in the layouts of a kernel that it compiles."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton")

import torch
import triton
import triton.language as tl
from cross_compile import compiling_for
from fresh_process import run_python


@triton.jit
def sum_tokens_kernel(x_ptr, out_ptr, CHANNELS: tl.constexpr, SCATTERED: tl.constexpr):
    """The sum of the tokens of 4 patches in 16 channels, each of 8 x 8 pixels.

    Grid: (1,)
    Writes: out_ptr (64,).
    """
    # [x, patch, y, channel]
    x = tl.arange(0, 8)[:, None, None, None]
    patch = tl.arange(0, 4)[None, :, None, None]
    y = tl.arange(0, 8)[None, None, :, None]
    channel = tl.arange(0, 16)[None, None, None, :]
    tile = tl.load(x_ptr + ((patch * 8 + y) * 8 + x) * CHANNELS + channel)
    # [64, 64]
    rows = tl.reshape(tl.permute(tile, (1, 3, 2, 0)), (64, 64)).to(tl.float32)
    if SCATTERED:
        # channels 8 to 15 and patches are one axis: lane bits 0 and 4
        total = tl.sum(tl.sum(tl.reshape(rows, (8, 8, 64)), 1), 0)
    else:
        total = tl.sum(tl.sum(tl.sum(tl.reshape(rows, (4, 2, 8, 64)), 2), 1), 0)
    tl.store(out_ptr + tl.arange(0, 64), total)


def compile_sum(target: str, scattered: bool) -> None:
    x = torch.empty(32, 8, 96, dtype=torch.bfloat16, device="meta")
    out = torch.empty(64, device="meta")
    with compiling_for(target):
        sum_tokens_kernel[(1,)](x, out, CHANNELS=96, SCATTERED=scattered)


@pytest.mark.parametrize("target", ["sm_90", pytest.param("gfx942", marks=pytest.mark.full)])
def test_an_axis_in_lanes_that_do_not_adjoin_is_found(target):
    script = f"""
        import sys

        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_reduce_layouts import compile_sum

        compile_sum({target!r}, scattered=False)
        try:
            compile_sum({target!r}, scattered=True)
        except AssertionError as error:
            print(error)
    """
    assert "sum_tokens_kernel sums over axis 0 of 8x64 in lane bits" in run_python(script)
