"""The IPSA kernels, run: results and gradients against float64, and how they behave as operators.

Without a GPU the kernels run in Triton's interpreter; on one the same tests run there.
"""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from interpreter import kept
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from catkernels import reference
from catkernels.ops import ipsa
from catkernels.testing import Shape, assert_within_error_budget, make_ipsa_inputs

pytestmark = pytest.mark.usefixtures("round_to_nearest_bf16", "poisoned_memory")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
INPUTS = ("qkv", "bias_table", "qkv_bias")


@dataclass(frozen=True)
class Case:
    """A call: its shape, and which inputs it lacks."""

    name: str
    batch: int
    height: int
    width: int
    patch_size: int = 7
    num_heads: int = 2
    head_dim: int = 32
    without: tuple[str, ...] = ()
    scale: float | None = None
    dropout_p: float = 0.0

    def __str__(self) -> str:
        return self.name

    def inputs(self, dtype: torch.dtype, device: torch.device, seed=0) -> dict[str, Tensor]:
        channels = self.num_heads * self.head_dim
        sizes = (self.batch, self.height, self.width, channels, self.num_heads, self.patch_size)
        inputs = make_ipsa_inputs(Shape(self.name, *sizes), dtype, device, seed=seed)
        return inputs | dict.fromkeys(self.without)

    def attend(self, qkv: Tensor, bias_table: Tensor | None, qkv_bias: Tensor | None) -> Tensor:
        """By the kernels."""
        return ipsa.ipsa_attention(
            qkv,
            bias_table,
            qkv_bias,
            num_heads=self.num_heads,
            patch_size=self.patch_size,
            scale=self.head_dim**-0.5 if self.scale is None else self.scale,
            dropout_p=self.dropout_p,
        )

    def specified(self, qkv: Tensor, bias_table: Tensor | None, qkv_bias: Tensor | None) -> Tensor:
        """By the reference."""
        return reference.ipsa_attention(
            qkv,
            bias_table,
            num_heads=self.num_heads,
            patch_size=self.patch_size,
            scale=self.scale,
            qkv_bias=qkv_bias,
            dropout_p=self.dropout_p,
        )

    @property
    def padded(self) -> bool:
        return bool(self.height % self.patch_size or self.width % self.patch_size)


def results(attend, inputs: dict[str, Tensor | None], grad_out: Tensor) -> dict[str, Tensor]:
    """The output and the gradients of the inputs that are in it."""
    leaves = {k: t.detach().requires_grad_() for k, t in inputs.items() if t is not None}
    out = attend(*(leaves.get(name) for name in INPUTS))
    grads = torch.autograd.grad(out, list(leaves.values()), grad_out, allow_unused=True)
    gradients = {f"d{k}": g for k, g in zip(leaves, grads, strict=True) if g is not None}
    return {"out": out.detach(), **gradients}


def converted(inputs: dict[str, Tensor | None], dtype: torch.dtype) -> dict[str, Tensor | None]:
    return {name: None if t is None else t.to(dtype) for name, t in inputs.items()}


def random_grad(case: Case, like: Tensor, seed: int = 0) -> Tensor:
    """A gradient of a case's output, in the dtype and on the device of ``like``."""
    size = (case.batch, case.height, case.width, case.num_heads * case.head_dim)
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(like)


def check(*draws: tuple[Case, dict[str, Tensor | None]]) -> None:
    """Compare outputs and all gradients with float64; plain PyTorch computes in qkv's dtype.

    Draws are judged together, each in units of its largest true value: in one small tensor the
    largest error of plain PyTorch is now and then tiny by luck.
    """
    pools = defaultdict(lambda: ([], [], []))
    for seed, (case, inputs) in enumerate(draws):
        qkv = inputs["qkv"]
        grad_out = random_grad(case, qkv, seed)
        actual = results(case.attend, inputs, grad_out)
        same_dtype = results(case.specified, converted(inputs, qkv.dtype), grad_out)
        float64 = results(case.specified, converted(inputs, torch.float64), grad_out.double())
        assert actual.keys() == float64.keys()
        for name, truth in float64.items():
            assert actual[name].dtype == inputs.get(name.removeprefix("d"), qkv).dtype, name
            # a power of two: exact in every dtype
            unit = 2.0 ** truth.abs().max().clamp_min(1e-30).log2().floor().item()
            for pool, of in zip(pools[name], (actual, same_dtype, float64), strict=True):
                pool.append(of[name].flatten() / unit)
    for name, pool in pools.items():
        assert_within_error_budget(*map(torch.cat, pool), f"{draws[0][0]}: {name}")


def draws(case: Case, dtype: torch.dtype, device: torch.device):
    """Inputs of one case, several of them where they cost nothing."""
    number = 4 if device.type == "cuda" else 1
    return [(case, case.inputs(dtype, device, seed=seed)) for seed in range(number)]


CASES = [
    Case("plain", 2, 14, 7),
    Case("padded", 1, 9, 10),
    Case("padded-below", 1, 9, 14),
    Case("padded-right", 2, 7, 9, num_heads=1),
    Case("no-table", 1, 14, 7, without=("bias_table",)),
    Case("no-qkv-bias", 1, 10, 9, num_heads=1, without=("qkv_bias",)),
    Case("nothing-but-qkv", 1, 8, 7, without=("bias_table", "qkv_bias")),
    Case("one-pixel", 1, 1, 1),
    Case("one-window-wide", 3, 14, 7, num_heads=1),
    Case("scale", 1, 14, 7, scale=0.5),
    Case("negative-scale", 1, 7, 7, scale=-0.1),
    Case("N1", 3, 9, 11, patch_size=1),
    Case("N2", 3, 8, 10, patch_size=2),
    Case("N2-padded", 3, 7, 9, patch_size=2),
    Case("N3-padded", 4, 7, 10, patch_size=3),
    Case("N4", 3, 8, 12, patch_size=4),
    Case("N4-padded", 3, 7, 10, patch_size=4),
    Case("N5-padded", 3, 9, 12, patch_size=5),
    Case("N6-padded", 2, 9, 6, patch_size=6),
    Case("N8", 1, 16, 8, patch_size=8),
    Case("N8-padded", 1, 9, 10, patch_size=8, num_heads=1),
    Case("D16", 1, 14, 7, head_dim=16),
    Case("D24", 1, 9, 7, head_dim=24, num_heads=3),
    Case("D48", 1, 9, 7, head_dim=48),
    Case("D64", 1, 9, 7, head_dim=64),
    Case("D96", 1, 9, 7, head_dim=96),
    Case("D128", 1, 9, 7, head_dim=128),
]
NAMED = {case.name: case for case in CASES}
PLAIN, PADDED, PACKED = NAMED["plain"], NAMED["padded"], NAMED["N4-padded"]


def every_case() -> Iterator[pytest.param]:
    """All cases in float32, some of them in half precision; the rest with `--full`."""
    for case, dtype in itertools.product(CASES, DTYPES):
        sampled = dtype == torch.float32 or case in (PLAIN, PADDED, PACKED, NAMED["D96"])
        marks = () if sampled else pytest.mark.full
        yield pytest.param(case, dtype, id=f"{case}-{dtype}", marks=marks)


@pytest.mark.parametrize(("case", "dtype"), list(every_case()))
def test_matches_float64(case, dtype, device, launches):
    check(*draws(case, dtype, device))
    assert launches["ipsa_forward_kernel"] == launches["ipsa_backward_kernel"] > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_shapes(dtype, device, launches, full):
    """Shapes as nobody would pick them, 1000 in all with `--full`."""
    random_number = random.Random(str(dtype))
    for _ in range(56 if full else 1):
        cases = [random_case(random_number) for _ in range(6)]
        check(*((case, case.inputs(dtype, device)) for case in cases))


def random_case(random_number: random.Random) -> Case:
    patch_size = random_number.randint(1, 8)
    case = Case(
        "",
        batch=random_number.randint(1, 3),
        height=random_number.randint(1, 2 * patch_size),
        width=random_number.randint(1, 2 * patch_size),
        patch_size=patch_size,
        num_heads=random_number.randint(1, 3),
        head_dim=random_number.choice([16, 24, 32, 40, 48, 64, 72, 96, 128]),
        without=random_number.choice([(), (), ("bias_table",), ("qkv_bias",)]),
        scale=random_number.choice([None, None, 0.1]),
    )
    return replace(case, name=str(vars(case)))


@pytest.mark.parametrize("parameters", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_parameters_keep_their_dtype(dtype, parameters, device, launches):
    inputs = PADDED.inputs(parameters, device)
    check((PADDED, inputs | {"qkv": inputs["qkv"].to(dtype)}))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("magnitude", [30.0, 3000.0])
def test_logits_that_overflow_exp(magnitude, dtype, device, launches):
    # the scale is a power of two: its rounding, blown up by the logits, is not in question
    case = replace(PADDED, head_dim=16)
    both = draws(case, dtype, device)
    for _, inputs in both:
        inputs["bias_table"] *= magnitude
        inputs["qkv"][..., : 2 * 32] *= magnitude**0.5
    check(*both)


@pytest.mark.parametrize("case", [PLAIN, PADDED, PACKED, NAMED["D24"]], ids=str)
def test_reads_nothing_beside_its_inputs(case, device, launches):
    def amid_nan(tensor: Tensor) -> Tensor:
        room = torch.full((tensor.numel() + 8192,), float("nan"), device=device)
        return room[4096:-4096].view(tensor.shape).copy_(tensor)

    inputs = case.inputs(torch.float32, device)
    grad_out = random_grad(case, inputs["qkv"])
    same = results(case.attend, inputs, grad_out)
    surrounded = {name: amid_nan(tensor) for name, tensor in inputs.items()}
    for name, tensor in results(case.attend, surrounded, amid_nan(grad_out)).items():
        assert torch.equal(tensor, same[name]), name


def test_any_strides(device, launches):
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


def kept_weights(case: Case, seed: int) -> Tensor:
    """Which weights a call keeps: (B, windows, heads, N*N, N*N)."""
    windows = -(-case.height // case.patch_size) * -(-case.width // case.patch_size)
    tokens = case.patch_size**2
    keep = kept(seed, case.dropout_p, tokens, tokens, case.num_heads, case.batch * windows)
    return keep.view(case.batch, windows, case.num_heads, tokens, tokens)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case("dropout", 1, 14, 7, dropout_p=0.25),
        Case("dropout-padded", 1, 10, 9, dropout_p=0.1),
        Case("dropout-packed", 3, 7, 10, patch_size=4, dropout_p=0.5),
        Case("dropout-N6", 1, 6, 12, patch_size=6, dropout_p=0.1),
        Case("dropout-of-most", 1, 8, 8, patch_size=8, dropout_p=0.9),
    ],
    ids=str,
)
def test_dropout(case, dtype, device, launches, monkeypatch):
    torch.manual_seed(1)
    keep = kept_weights(case, torch.randint(2**63 - 1, (1,), device=device).item()).to(device)
    assert abs(keep.double().mean() - (1 - case.dropout_p)) < 0.03
    keep_scale = 1 / (1 - round(case.dropout_p * 2**16) / 2**16)
    monkeypatch.setattr(F, "dropout", lambda weights, p: weights * keep * keep_scale)
    torch.manual_seed(1)
    check((case, case.inputs(dtype, device)))


DROPOUT = Case("dropout", 1, 14, 14, dropout_p=0.5)


def test_dropout_follows_the_generator(device, launches):
    inputs = DROPOUT.inputs(torch.float32, device).values()
    torch.manual_seed(1)
    first, second = DROPOUT.attend(*inputs), DROPOUT.attend(*inputs)
    torch.manual_seed(1)
    assert torch.equal(first, DROPOUT.attend(*inputs))
    assert not torch.equal(first, second)


def test_dropout_under_checkpointing(device, launches):
    def checkpointed(*tensors: Tensor) -> Tensor:
        return checkpoint(DROPOUT.attend, *tensors, use_reentrant=False)

    inputs = DROPOUT.inputs(torch.float32, device)
    grad_out = random_grad(DROPOUT, inputs["qkv"])
    torch.manual_seed(1)
    saved = results(DROPOUT.attend, inputs, grad_out)
    torch.manual_seed(1)
    for name, tensor in results(checkpointed, inputs, grad_out).items():
        assert torch.equal(tensor, saved[name]), name


def test_gradients_of_the_qkv_bias_cancel(device, launches):
    """A shift of all keys changes no softmax; one of all values shifts the output."""
    inputs = PADDED.inputs(torch.float32, device)
    grad_out = random_grad(PADDED, inputs["qkv"])
    grads = results(PADDED.attend, inputs, grad_out)
    dq, dk, dv = grads["dqkv_bias"].chunk(3)
    _, dk_inside, dv_inside = grads["dqkv"].sum((0, 1, 2)).chunk(3)
    assert not dq.any()
    assert dk.abs().max() > 1
    torch.testing.assert_close(dk, -dk_inside, rtol=0, atol=1e-5)
    torch.testing.assert_close(dv + dv_inside, grad_out.sum((0, 1, 2)), rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", [PLAIN, PADDED, PACKED], ids=str)
def test_same_bits_for_any_chunking(case, device, launches, monkeypatch):
    from catkernels.kernels import ipsa_launch

    case = replace(case, dropout_p=0.25)
    inputs = case.inputs(torch.float32, device)
    by_chunking = []
    for programs in (1, 7, 10**6):
        monkeypatch.setattr(ipsa_launch, "PROGRAMS", programs)
        torch.manual_seed(0)
        by_chunking.append(results(case.attend, inputs, random_grad(case, inputs["qkv"])))
    for other in by_chunking[1:]:
        for name in ("out", "dqkv"):
            assert torch.equal(by_chunking[0][name], other[name]), name


def test_same_bits_from_run_to_run(device, launches):
    inputs = PADDED.inputs(torch.bfloat16, device)
    grad_out = random_grad(PADDED, inputs["qkv"])
    first = results(PADDED.attend, inputs, grad_out)
    for _ in range(20 if device.type == "cuda" else 2):
        for name, tensor in results(PADDED.attend, inputs, grad_out).items():
            assert torch.equal(tensor, first[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_gradients_of_some_inputs(dtype, device, launches):
    """Whatever is frozen, the gradients of the others keep their bits."""
    inputs = PADDED.inputs(dtype, device)
    grad_out = random_grad(PADDED, inputs["qkv"])
    every = results(PADDED.attend, inputs, grad_out)
    for wanted in INPUTS:
        leaves = inputs | {wanted: inputs[wanted].clone().requires_grad_()}
        (grad,) = torch.autograd.grad(PADDED.attend(**leaves), leaves[wanted], grad_out)
        assert torch.equal(grad, every[f"d{wanted}"]), wanted
    with torch.no_grad():
        assert torch.equal(PADDED.attend(**inputs), every["out"])


def test_no_bias_without_padding(device, launches):
    """As in the reference, a qkv bias that no pixel uses is in no graph."""
    inputs = PLAIN.inputs(torch.float32, device)
    out = PLAIN.attend(**inputs | {"qkv_bias": inputs["qkv_bias"].requires_grad_()})
    assert not out.requires_grad


@pytest.mark.parametrize("size", [(0, 7, 7), (2, 0, 7), (2, 7, 0)])
def test_nothing_in_nothing_out(size, device):
    inputs = Case("", *size).inputs(torch.float32, device)
    inputs = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    out = PLAIN.attend(**inputs)
    assert out.shape == (*size, 64)
    out.sum().backward()
    assert inputs["qkv"].grad.shape == inputs["qkv"].shape
    assert not inputs["bias_table"].grad.any()


@pytest.mark.full
def test_more_windows_than_a_grid_axis_holds(device, launches):
    """Grid axes but the first end at 65,535 programs. The weight of a single token is 1."""
    case = Case("", 1, 66000, 1, patch_size=1, num_heads=1, head_dim=16)
    inputs = case.inputs(torch.float32, device)
    _, _, values = inputs["qkv"].chunk(3, -1)
    assert torch.equal(case.attend(**inputs), values)


def test_second_derivatives_are_refused(device, launches):
    inputs = {k: t.requires_grad_() for k, t in PADDED.inputs(torch.float32, device).items()}
    out = PADDED.attend(**inputs)
    for grad_out in (torch.ones_like(out), torch.ones_like(out, requires_grad=True)):
        grads = torch.autograd.grad(out, list(inputs.values()), grad_out, create_graph=True)
        for grad in grads:
            with pytest.raises(RuntimeError, match='backend="reference"'):
                torch.autograd.grad(grad.square().sum(), inputs["qkv"], retain_graph=True)


def test_function_transforms(device, launches):
    """`torch.func.grad` is right; `torch.func.vmap` is right or says that it cannot."""
    inputs = PADDED.inputs(torch.float32, device)

    def loss(qkv: Tensor) -> Tensor:
        return PADDED.attend(qkv, inputs["bias_table"], inputs["qkv_bias"]).square().sum()

    qkv = inputs["qkv"].clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(qkv), qkv)
    assert torch.equal(torch.func.grad(loss)(inputs["qkv"]), expected)
    stacked = torch.stack([inputs["qkv"], 2 * inputs["qkv"]])
    mapped = torch.func.vmap(loss)(stacked)
    assert torch.equal(mapped, torch.stack([loss(qkv) for qkv in stacked]))
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(torch.func.grad(loss))(stacked)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(PADDED, torch.float16), (replace(PLAIN, dropout_p=0.5), torch.float32)],
    ids=str,
)
def test_operators_are_sound(case, dtype, device, launches):
    inputs = list(case.inputs(dtype, device).values())
    seed = torch.tensor([1], device=device) if case.dropout_p else None
    problem = (case.num_heads, case.patch_size, 0.2, case.dropout_p)
    operators = torch.ops.catkernels
    for save_lse in (False, True):
        torch.library.opcheck(operators.ipsa_forward, (*inputs, seed, save_lse, *problem))
    _, lse = operators.ipsa_forward(*inputs, seed, dtype != torch.float32, *problem)
    grad_out = random_grad(case, inputs[0])
    for needs_table in (False, True):
        arguments = (grad_out, *inputs, seed, lse, needs_table, *problem)
        torch.library.opcheck(operators.ipsa_backward, arguments)


def test_compiles_to_one_graph(device, launches):
    case = replace(PADDED, dropout_p=0.5)
    torch._dynamo.reset()
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    compiled = torch.compile(case.attend, fullgraph=True, backend=backend)
    for batch in (1, 2, 3, 4):
        inputs = replace(case, batch=batch).inputs(torch.float32, device)
        grad_out = random_grad(replace(case, batch=batch), inputs["qkv"])
        # the first other batch size may recompile, with a batch size that varies; no other may
        with torch._dynamo.config.patch(error_on_recompile=batch > 2):
            torch.manual_seed(0)
            actual = results(compiled, inputs, grad_out)
        torch.manual_seed(0)
        expected = results(case.attend, inputs, grad_out)
        for name, tensor in actual.items():
            assert torch.equal(tensor, expected[name]), name


def test_exports(device, launches):
    class Attention(torch.nn.Module):
        def forward(self, qkv: Tensor, bias_table: Tensor, qkv_bias: Tensor) -> Tensor:
            return PADDED.attend(qkv, bias_table, qkv_bias)

    inputs = PADDED.inputs(torch.float32, device)
    exported = torch.export.export(Attention(), tuple(inputs.values()))
    assert torch.equal(exported.module()(*inputs.values()), PADDED.attend(**inputs))


@pytest.mark.parametrize("case", [PLAIN, PADDED], ids=str)
def test_counts_flops(case, device, launches):
    """As many as of the reference's products, and a third product of the backward pass."""

    def flops(attend) -> int:
        inputs = case.inputs(torch.float32, device)
        with FlopCounterMode(display=False) as counter:
            results(attend, inputs, random_grad(case, inputs["qkv"]))
        return counter.get_total_flops()

    assert flops(case.attend) * 6 == flops(case.specified) * 7


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


def test_float32_follows_the_precision_setting():
    from catkernels.kernels.launch import dot_precision

    meta = torch.device("meta")
    assert dot_precision(torch.float32, meta) == "ieee"
    torch.set_float32_matmul_precision("high")
    try:
        assert dot_precision(torch.float32, meta) == "tf32"
        assert dot_precision(torch.float16, meta) == "ieee"
    finally:
        torch.set_float32_matmul_precision("highest")
