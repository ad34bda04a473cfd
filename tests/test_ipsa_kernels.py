"""The IPSA kernels, run: results and gradients against float64, and their bits.

Without a GPU the kernels run in Triton's interpreter; on one the same tests run there.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace

import pytest
import torch
from kernel_cases import DTYPES, NAMED, PACKED, PADDED, PLAIN, check, draws
from torch import Tensor

from catkernels.cases import IPSA_CASES, IPSACase, random_grad, results
from catkernels.dropout import SameDropout

pytestmark = pytest.mark.usefixtures("round_to_nearest_bf16", "poisoned_memory", "launches")


def every_case() -> Iterator:
    """All cases in float32, some of them in half precision; the rest with `--full`."""
    for case, dtype in itertools.product(IPSA_CASES, DTYPES):
        sampled = dtype == torch.float32 or case in (PLAIN, PADDED, PACKED, NAMED["D96"])
        marks = () if sampled else pytest.mark.full
        yield pytest.param(case, dtype, id=f"{case}-{dtype}", marks=marks)


@pytest.mark.parametrize(("case", "dtype"), list(every_case()))
def test_matches_float64(case, dtype, device, launches):
    check(*draws(case, dtype, device))
    assert launches["ipsa_forward_kernel"] == launches["ipsa_backward_kernel"] > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_shapes(dtype, device, full):
    """Shapes as nobody would pick them, 1000 in all with `--full`."""
    random_number = random.Random(str(dtype))
    for _ in range(56 if full else 1):
        cases = [random_case(random_number) for _ in range(6)]
        check(*(draw for case in cases for draw in draws(case, dtype, device)))


def random_case(random_number: random.Random) -> IPSACase:
    patch_size = random_number.randint(1, 8)
    # of fewer pixels most of a window is one padded key many times over, whose score's rounding is
    # then the whole error: plain PyTorch's is now and then near none
    least, most = (patch_size + 1) // 2, 2 * patch_size
    case = IPSACase(
        "",
        batch=random_number.randint(1, 3),
        height=random_number.randint(least, most),
        width=random_number.randint(least, most),
        patch_size=patch_size,
        num_heads=random_number.randint(1, 3),
        head_dim=random_number.choice([16, 24, 32, 40, 48, 64, 72, 96, 128]),
        without=random_number.choice([(), (), ("bias_table",), ("qkv_bias",)]),
        scale=random_number.choice([None, None, 0.1]),
    )
    return replace(case, name=str(vars(case)))


@pytest.mark.parametrize("parameters", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_parameters_keep_their_dtype(dtype, parameters, device):
    inputs = PADDED.inputs(parameters, device)
    check((PADDED, inputs | {"qkv": inputs["qkv"].to(dtype)}))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("magnitude", [30.0, 3000.0])
def test_logits_that_overflow_exp(magnitude, dtype, device):
    # the scale is a power of two: its rounding, blown up by the logits, is not in question
    case = replace(PADDED, head_dim=16)
    both = draws(case, dtype, device)
    for _, inputs in both:
        inputs["bias_table"] *= magnitude
        inputs["qkv"][..., : 2 * 32] *= magnitude**0.5
    check(*both)


@pytest.mark.parametrize("case", [PLAIN, PADDED, PACKED, NAMED["D24"]], ids=str)
def test_reads_nothing_beside_its_inputs(case, device):
    def amid_nan(tensor: Tensor) -> Tensor:
        room = torch.full((tensor.numel() + 8192,), float("nan"), device=device)
        return room[4096:-4096].view(tensor.shape).copy_(tensor)

    inputs = case.inputs(torch.float32, device)
    grad_out = random_grad(case.shape, inputs["qkv"])
    same = results(case.attend, inputs, grad_out)
    surrounded = {name: amid_nan(tensor) for name, tensor in inputs.items()}
    for name, tensor in results(case.attend, surrounded, amid_nan(grad_out)).items():
        assert torch.equal(tensor, same[name]), name


def test_any_strides(device):
    inputs = PADDED.inputs(torch.float32, device)
    strided = {
        "qkv": inputs["qkv"].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        "bias_table": inputs["bias_table"].t().contiguous().t(),
        "qkv_bias": torch.stack([inputs["qkv_bias"]] * 2, -1)[:, 0],
    }
    assert not any(tensor.is_contiguous() for tensor in strided.values())
    expanded = torch.randn(64, device=device).expand(1, 9, 10, 64)
    same = results(PADDED.attend, inputs, expanded.contiguous())
    for name, tensor in results(PADDED.attend, strided, expanded).items():
        assert torch.equal(tensor, same[name]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        IPSACase("dropout", 1, 14, 7, dropout_p=0.25),
        IPSACase("dropout-padded", 1, 10, 9, dropout_p=0.1),
        IPSACase("dropout-packed", 3, 7, 10, patch_size=4, dropout_p=0.5),
        IPSACase("dropout-N6", 1, 6, 12, patch_size=6, dropout_p=0.1),
        IPSACase("dropout-of-most", 1, 8, 8, patch_size=8, dropout_p=0.9),
    ],
    ids=str,
)
def test_dropout(case, dtype, device):
    seed = 0x1234_5678_9ABC_DEF0
    keep = case.kept(seed)
    assert abs(keep.double().mean() - (1 - case.dropout_p)) < 0.03
    # alone, the few weights of a draw may have plain PyTorch's table gradient near exact by luck
    both = [(case, case.inputs(dtype, device, seed=draw)) for draw in range(2)]
    with SameDropout(seed, keep):
        check(*both)


DROPOUT = IPSACase("dropout", 1, 14, 14, dropout_p=0.5)


def test_dropout_follows_the_generator(device):
    inputs = DROPOUT.inputs(torch.float32, device).values()
    torch.manual_seed(1)
    first, second = DROPOUT.attend(*inputs), DROPOUT.attend(*inputs)
    torch.manual_seed(1)
    assert torch.equal(first, DROPOUT.attend(*inputs))
    assert not torch.equal(first, second)


def test_gradients_of_the_qkv_bias_cancel(device):
    """A shift of all keys changes no softmax; one of all values shifts the output."""
    inputs = PADDED.inputs(torch.float32, device)
    grad_out = random_grad(PADDED.shape, inputs["qkv"])
    grads = results(PADDED.attend, inputs, grad_out)
    dq, dk, dv = grads["dqkv_bias"].chunk(3)
    _, dk_inside, dv_inside = grads["dqkv"].sum((0, 1, 2)).chunk(3)
    assert not dq.any()
    assert dk.abs().max() > 1
    torch.testing.assert_close(dk, -dk_inside, rtol=0, atol=1e-5)
    torch.testing.assert_close(dv + dv_inside, grad_out.sum((0, 1, 2)), rtol=0, atol=1e-4)


def launching(**changes: int) -> AbstractContextManager:
    """Kernels are launched with these fields of their launches changed."""
    from catkernels.kernels.launch import overriding

    return overriding(lambda table, problem, launch: replace(launch, **changes))


@pytest.mark.parametrize("case", [PADDED, PACKED], ids=str)
def test_same_bits_for_any_chunking(case, device):
    """But for the table's gradient, whose sums follow the chunks."""
    case = replace(case, dropout_p=0.25)
    inputs = case.inputs(torch.float32, device)
    by_chunking = []
    for programs in (1, 7, 10**6):
        torch.manual_seed(0)
        with launching(num_programs=programs):
            by_chunking.append(results(case.attend, inputs, random_grad(case.shape, inputs["qkv"])))
    for other in by_chunking[1:]:
        for name in ("out", "dqkv"):
            assert torch.equal(by_chunking[0][name], other[name]), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", [PLAIN, PADDED, replace(PLAIN, dropout_p=0.25)], ids=str)
def test_same_bits_without_fetching_ahead(case, device):
    """What is copied while another tile is multiplied arrives whole."""
    case = replace(case, batch=256)
    inputs = case.inputs(torch.bfloat16, device)
    by_stages = []
    for stages in (1, 3):
        torch.manual_seed(0)
        with launching(num_stages=stages):
            by_stages.append(results(case.attend, inputs, random_grad(case.shape, inputs["qkv"])))
    for name, tensor in by_stages[0].items():
        assert torch.equal(tensor, by_stages[1][name]), name


def test_same_bits_from_run_to_run(device, full):
    inputs = PADDED.inputs(torch.bfloat16, device)
    grad_out = random_grad(PADDED.shape, inputs["qkv"])
    first = results(PADDED.attend, inputs, grad_out)
    for _ in range((1000 if full else 20) if device.type == "cuda" else 2):
        for name, tensor in results(PADDED.attend, inputs, grad_out).items():
            assert torch.equal(tensor, first[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_gradients_of_some_inputs(dtype, device):
    """Whatever is frozen, the gradients of the others keep their bits."""
    inputs = PADDED.inputs(dtype, device)
    grad_out = random_grad(PADDED.shape, inputs["qkv"])
    every = results(PADDED.attend, inputs, grad_out)
    for wanted in inputs:
        leaves = inputs | {wanted: inputs[wanted].clone().requires_grad_()}
        (grad,) = torch.autograd.grad(PADDED.attend(**leaves), leaves[wanted], grad_out)
        assert torch.equal(grad, every[f"d{wanted}"]), wanted
    with torch.no_grad():
        assert torch.equal(PADDED.attend(**inputs), every["out"])


def test_no_bias_without_padding(device):
    """As in the reference, a qkv bias that no pixel uses is in no graph."""
    inputs = PLAIN.inputs(torch.float32, device)
    out = PLAIN.attend(**inputs | {"qkv_bias": inputs["qkv_bias"].requires_grad_()})
    assert not out.requires_grad


@pytest.mark.launches_nothing
@pytest.mark.parametrize("size", [(0, 7, 7), (2, 0, 7), (2, 7, 0)])
def test_nothing_in_nothing_out(size, device):
    inputs = IPSACase("", *size).inputs(torch.float32, device)
    inputs = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    out = PLAIN.attend(**inputs)
    assert out.shape == (*size, 64)
    out.sum().backward()
    assert inputs["qkv"].grad.shape == inputs["qkv"].shape
    assert not inputs["bias_table"].grad.any()


@pytest.mark.full
def test_more_windows_than_a_grid_axis_holds(device):
    """Grid axes but the first end at 65,535 programs. The weight of a single token is 1."""
    case = IPSACase("", 1, 66000, 1, patch_size=1, num_heads=1, head_dim=16)
    inputs = case.inputs(torch.float32, device)
    _, _, values = inputs["qkv"].chunk(3, -1)
    assert torch.equal(case.attend(**inputs), values)


@pytest.mark.parametrize("case", [PADDED, PACKED], ids=str)
def test_same_bits_with_offsets_of_64_bits(case, device, monkeypatch):
    from catkernels.kernels.ipsa.launch import Problem

    inputs = case.inputs(torch.float16, device)
    grad_out = random_grad(case.shape, inputs["qkv"])
    narrow = results(case.attend, inputs, grad_out)
    monkeypatch.setattr(Problem, "wide", True)
    for name, tensor in results(case.attend, inputs, grad_out).items():
        assert torch.equal(tensor, narrow[name]), name


@pytest.mark.launches_nothing
def test_offsets_have_64_bits_where_32_are_too_few(device):
    """The rows of a window are as far apart as its map is wide."""
    from catkernels.kernels.ipsa.launch import Problem

    for width, is_wide in ((10**6, False), (1065221, True)):
        qkv = torch.empty(1, 7, width, 3 * 96, device="meta")
        assert Problem.of(qkv, 3, 7, 0.2, 0.0).wide == is_wide


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.full
def test_more_elements_than_32_bits_count(device):
    """The last images of a map of more than 2**31 values are the same alone; takes 12 GB."""
    case = IPSACase("", 2400, 56, 56, num_heads=3)
    shape = (case.batch, case.height, case.width, 3 * 96)
    qkv = torch.randn(shape, device=device, dtype=torch.float16)
    inputs = replace(case, batch=1).inputs(torch.float16, device) | {"qkv": qkv}
    grad_out = qkv[..., :96].contiguous()
    assert qkv.numel() > 2**31
    whole = results(case.attend, inputs, grad_out)
    last = results(case.attend, inputs | {"qkv": qkv[-8:]}, grad_out[-8:])
    for name in ("out", "dqkv"):
        assert torch.equal(whole[name][-8:], last[name]), name
