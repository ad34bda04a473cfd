"""The first call of a shape compiles its kernels; nobody should have to wait long for that."""

from __future__ import annotations

import pytest
import torch
from fresh_process import run_python

LIMIT_S = 5

FIRST_CALLS = """
    import time
    import torch
    import triton
    import catkernels
    from catkernels.block_cases import MLPCase, NormCase, ProjectionCase
    from catkernels.cases import cat_stages, make_cpsa_inputs, make_ipsa_inputs
    from catkernels.torch_state.device import best_device

    device = best_device()
    # what every program waits for once: the device's context, and its libraries
    x = torch.randn(64, 64, device=device, requires_grad=True)
    (x @ x).softmax(-1).sum().backward()

    def now():
        torch.get_device_module(device).synchronize()
        return time.perf_counter()

    def measure(name, call, inputs, **options):
        leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
        start = now()
        call(**leaves, **options).sum().backward()
        print(name, now() - start)

    for shape in (*cat_stages("small", batch=8), cat_stages("small", 512, batch=8)[0]):
        options, heads = {"patch_size": 7, "backend": "triton"}, {"num_heads": shape.num_heads}
        inputs = make_ipsa_inputs(shape, torch.bfloat16, device)
        measure(f"ipsa-{shape}", catkernels.ipsa_attention, inputs, **heads, **options)
        inputs = make_cpsa_inputs(shape, torch.bfloat16, device)
        measure(f"cpsa-{shape}", catkernels.cpsa_attention, inputs, **options)
    for kind in (MLPCase, ProjectionCase, NormCase):
        for channels in (64, 96, 192):
            case = kind(f"{kind.__name__}-C{channels}", 8, 28, 28, channels)
            inputs = case.inputs(torch.bfloat16, device)
            measure(case.name, lambda **tensors: case.attend(*tensors.values()), inputs)
"""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, whose driver takes part")
def test_the_first_call_of_a_shape_is_soon_done(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    lines = run_python(FIRST_CALLS).splitlines()
    seconds = {name: float(value) for name, value in map(str.split, lines)}
    assert len(seconds) == 19
    assert max(seconds.values()) < LIMIT_S, seconds
