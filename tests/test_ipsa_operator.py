"""IPSA as a PyTorch operator: autograd, transforms, compilation, export, CUDA graphs, FLOPs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_cases import PADDED, PLAIN
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from catkernels.cases import random_grad, results
from catkernels.ops import ipsa

pytestmark = pytest.mark.usefixtures("round_to_nearest_bf16", "poisoned_memory", "launches")

# what PyTorch sees of a call takes no more than one window, which reaches beyond the map
WINDOW = replace(PADDED, height=6, width=5)


def test_dropout_under_checkpointing(device):
    case = replace(WINDOW, dropout_p=0.5)

    def checkpointed(*tensors: Tensor) -> Tensor:
        return checkpoint(case.attend, *tensors, use_reentrant=False)

    inputs = case.inputs(torch.float32, device)
    grad_out = random_grad(case.shape, inputs["qkv"])
    torch.manual_seed(1)
    saved = results(case.attend, inputs, grad_out)
    torch.manual_seed(1)
    for name, tensor in results(checkpointed, inputs, grad_out).items():
        assert torch.equal(tensor, saved[name]), name


def test_second_derivatives_are_refused(device):
    inputs = {k: t.requires_grad_() for k, t in WINDOW.inputs(torch.float32, device).items()}
    out = WINDOW.attend(**inputs)
    for grad_out in (torch.ones_like(out), torch.ones_like(out, requires_grad=True)):
        grads = torch.autograd.grad(out, list(inputs.values()), grad_out, create_graph=True)
        for grad in grads:
            with pytest.raises(RuntimeError, match='backend="reference"'):
                torch.autograd.grad(grad.square().sum(), inputs["qkv"], retain_graph=True)


def test_function_transforms(device):
    """What more is asked of the functions, test_transforms.py tests."""
    inputs = WINDOW.inputs(torch.float32, device)

    def attend(qkv: Tensor) -> Tensor:
        return WINDOW.attend(qkv, inputs["bias_table"], inputs["qkv_bias"])

    def loss(qkv: Tensor) -> Tensor:
        return attend(qkv).square().sum()

    qkv = inputs["qkv"].clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(qkv), qkv)
    assert torch.equal(torch.func.grad(loss)(inputs["qkv"]), expected)
    stacked = torch.stack([inputs["qkv"], 2 * inputs["qkv"]])
    mapped = torch.func.vmap(attend)(stacked)
    assert torch.equal(mapped, torch.stack([attend(qkv) for qkv in stacked]))


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(WINDOW, torch.float16), (replace(PLAIN, batch=1, height=7, dropout_p=0.5), torch.float32)],
    ids=str,
)
def test_operators_are_sound(case, dtype, device):
    inputs = list(case.inputs(dtype, device).values())
    seed = torch.tensor([1], device=device) if case.dropout_p else None
    problem = (case.num_heads, case.patch_size, 0.2, case.dropout_p)
    operators = torch.ops.catkernels
    torch.library.opcheck(operators.ipsa_forward, (*inputs, seed, True, *problem))
    _, lse = operators.ipsa_forward(*inputs, seed, dtype != torch.float32, *problem)
    arguments = (random_grad(case.shape, inputs[0]), *inputs, seed, lse, case.padded, *problem)
    torch.library.opcheck(operators.ipsa_backward, arguments)


def test_compiles_to_one_graph(device):
    case = replace(WINDOW, dropout_p=0.5)
    torch._dynamo.reset()
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    compiled = torch.compile(case.attend, fullgraph=True, backend=backend)
    for batch in (2, 3, 4):
        inputs = replace(case, batch=batch).inputs(torch.float32, device)
        grad_out = random_grad(replace(case, batch=batch).shape, inputs["qkv"])
        # the first other batch size recompiles for batch sizes that vary; no other may
        with (
            torch._dynamo.config.patch(error_on_recompile=batch > 3),
            # Inductor draws random numbers of its own, and so another seed of the dropout
            torch._inductor.config.patch(fallback_random=True),
        ):
            torch.manual_seed(0)
            actual = results(compiled, inputs, grad_out)
        torch.manual_seed(0)
        expected = results(case.attend, inputs, grad_out)
        # Inductor adds the padded pixels' gradients in an order of its own
        torch.testing.assert_close(actual, expected)


def test_exports(device):
    class Attention(torch.nn.Module):
        def forward(self, qkv: Tensor, bias_table: Tensor, qkv_bias: Tensor) -> Tensor:
            return WINDOW.attend(qkv, bias_table, qkv_bias)

    inputs = WINDOW.inputs(torch.float32, device)
    exported = torch.export.export(Attention(), tuple(inputs.values()))
    assert torch.equal(exported.module()(*inputs.values()), WINDOW.attend(**inputs))


@pytest.mark.parametrize("case", [PLAIN, PADDED], ids=str)
def test_counts_flops(case, device):
    """As many as of the reference's products, and a third product of the backward pass."""

    def flops(attend) -> int:
        inputs = case.inputs(torch.float32, device)
        with FlopCounterMode(display=False) as counter:
            results(attend, inputs, random_grad(case.shape, inputs["qkv"]))
        return counter.get_total_flops()

    assert flops(case.attend) * 6 == flops(case.specified) * 7


@pytest.mark.launches_nothing
def test_unsupported_reasons(device):
    def reasons(**changes) -> list[str]:
        call = {"device": device, "dtype": torch.float32, "head_dim": 32, "patch_size": 7}
        return ipsa.unsupported_reasons(**call | changes)

    assert not reasons()
    for changes, word in (
        ({"device": torch.device("meta")}, "meta"),
        ({"dtype": torch.float64}, "float64"),
        ({"patch_size": 9}, "9"),
        ({"head_dim": 8}, "8"),
        ({"head_dim": 20}, "20"),
        ({"head_dim": 136}, "136"),
    ):
        (reason,) = reasons(**changes)
        assert word in reason
    assert len(reasons(dtype=torch.float64, patch_size=9, head_dim=8)) == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_in_a_cuda_graph(device):
    case = replace(PADDED, batch=64)
    inputs = case.inputs(torch.bfloat16, device)
    grad_out = random_grad(case.shape, inputs["qkv"])
    expected = results(case.attend, inputs, grad_out)
    static = {name: torch.zeros_like(tensor) for name, tensor in inputs.items()}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(case.attend, static, grad_out)
    for name, tensor in inputs.items():
        static[name].copy_(tensor)
    graph.replay()
    for name, tensor in captured.items():
        assert torch.equal(tensor, expected[name]), name
