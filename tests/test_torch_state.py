"""What `catkernels.torch_state` reads of PyTorch, and that nobody else reads what is private.

Where a new version of PyTorch has moved one of the private ends, this file is to fail first.
"""

from __future__ import annotations

import ast
import re
from functools import reduce
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap

import catkernels
from catkernels.torch_state import device as devices
from catkernels.torch_state import graphs, hooks, modes, tensors, transforms

PACKAGE = Path(catkernels.__file__).parent
# What our code takes of PyTorch that PyTorch does not document, by where it is found.
PRIVATE_ENDS = [
    "_C._functorch.peek_interpreter_stack",
    "_C._functorch.get_interpreter_stack",
    "_C._functorch.TransformType.Vmap",
    "_C._is_tracing",
    "_C._len_torch_dispatch_stack",
    "autograd.forward_ad._current_level",
    "nn.modules.module._has_any_global_hook",
    "overrides._get_current_function_mode_stack",
    "utils._device.DeviceContext",
    "utils._python_dispatch.TorchDispatchMode",
    "utils._python_dispatch._disable_current_modes",
    "_dynamo.OptimizedModule",
]
# The same of every module.
PRIVATE_ATTRIBUTES = [
    "_forward_pre_hooks",
    "_forward_hooks",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
    "_is_full_backward_hook",
    "_compiled_call_impl",
    "_non_persistent_buffers_set",
    "_modules",
    "_parameters",
    "_buffers",
]
# What a module holds, by name: read wherever its names matter, as every library does.
READ_EVERYWHERE = {"_non_persistent_buffers_set", "_modules", "_parameters", "_buffers"}


@pytest.mark.parametrize("end", PRIVATE_ENDS)
def test_pytorch_still_has(end):
    import torch._dynamo

    reduce(getattr, end.split("."), torch)


@pytest.mark.parametrize("attribute", PRIVATE_ATTRIBUTES)
def test_modules_still_have(attribute):
    assert hasattr(nn.Linear(1, 1), attribute)


def test_no_dictionary_of_hooks_is_overlooked():
    named = {name for name in vars(nn.Linear(1, 1)) if "hook" in name}
    assert named <= set(PRIVATE_ATTRIBUTES)


def private_reads(tree: ast.AST) -> list[str]:
    """What a file takes of PyTorch that is private, as far as its syntax shows."""
    names = {*PRIVATE_ATTRIBUTES, "_dynamo_marked_constant"} - READ_EVERYWHERE
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            read = ast.unparse(node)
            if node.attr in names or re.match(r"(torch(\.\w+)*|forward_ad)\._[a-zA-Z]", read):
                found.append(read)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            found += [alias.name for alias in node.names if alias.name.startswith("_")]
    return found


def test_nobody_else_reads_what_is_private():
    found = {
        str(file.relative_to(PACKAGE)): reads
        for file in PACKAGE.rglob("*.py")
        if "torch_state" not in file.parts and (reads := private_reads(ast.parse(file.read_text())))
    }
    assert not found


def test_a_graph_keeps_the_answer_to_a_constant_question():
    answers = []

    @graphs.constant_in_graphs
    def question():
        answers.append(len(answers))
        return answers[-1]

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: x + question(), backend="eager", fullgraph=True)
    assert compiled(torch.zeros(1)) == compiled(torch.zeros(1)) == 0
    assert question() > 0


def test_transforms_are_seen_within_only():
    seen = []

    def look(x):
        seen.append(
            (transforms.is_transformed(), transforms.is_forward_mode(), transforms.is_vmap())
        )
        return x.sum()

    x = torch.ones(2)
    look(x)
    grad(look)(x)
    vmap(look)(x)
    jvp(look, (x,), (x,))
    with forward_ad.dual_level():
        look(x)
    look(x)
    nothing, forward = (False, False, False), (True, True, False)
    assert seen == [
        nothing,
        (True, False, False),
        (True, False, True),
        forward,
        forward,
        nothing,
    ]


def test_modes_are_seen_within_only():
    assert not modes.is_observed()
    for mode in (torch.utils.flop_counter.FlopCounterMode(display=False), Listener()):
        with mode:
            assert modes.is_observed()
    with torch.device("meta"):
        assert not modes.is_observed()
    assert not modes.is_observed()


class Listener(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function, types, arguments=(), options=None):
        return function(*arguments, **(options or {}))


def test_a_tensor_made_of_others_is_a_wrapper():
    from torch.testing._internal.two_tensor import TwoTensor

    x = torch.ones(2)
    assert not tensors.is_wrapper(x)
    assert not tensors.is_wrapper(nn.Parameter(x))
    assert tensors.is_wrapper(TwoTensor(x, x))


def test_values_are_read_where_there_are_any():
    seen = []
    look = vmap(lambda x: (seen.append(tensors.values_can_be_read(x)), x)[1])
    plain = torch.ones(2)
    look(plain)
    with FakeTensorMode():
        seen += map(tensors.values_can_be_read, (plain, torch.ones(2)))
    seen.append(tensors.values_can_be_read(plain.to("meta")))
    assert not any(seen)
    assert tensors.values_can_be_read(plain)


def test_a_tensor_tells_that_it_was_written_to():
    x = torch.ones(2)
    before = tensors.version(x)
    x.add_(1)
    assert tensors.version(x) > before
    with torch.inference_mode():
        assert tensors.version(torch.ones(2)) == 0


def test_what_torch_compile_puts_around_a_module_is_known_by_its_name():
    module = nn.Linear(1, 1)
    assert not hooks.wraps_compiled(module)
    assert hooks.wraps_compiled(torch.compile(module, backend="eager"))


REGISTRATIONS = [
    "register_forward_pre_hook",
    "register_forward_hook",
    "register_full_backward_pre_hook",
    "register_full_backward_hook",
]


@pytest.mark.parametrize("registration", REGISTRATIONS)
def test_a_module_with_a_hook_is_intercepted(registration):
    module = nn.Linear(1, 1)
    assert not hooks.is_intercepted(module)
    handle = getattr(module, registration)(lambda *arguments: None)
    assert hooks.is_intercepted(module)
    handle.remove()
    assert not hooks.is_intercepted(module)


def test_hooks_of_all_modules_are_seen():
    assert not hooks.has_global_hooks()
    module = nn.Linear(1, 1)
    handle = nn.modules.module.register_module_forward_hook(lambda *arguments: None)
    assert hooks.has_global_hooks()
    assert hooks.is_intercepted(module)
    handle.remove()
    assert not hooks.has_global_hooks()
    assert not hooks.is_intercepted(module)


def test_a_module_compiled_by_itself_is_intercepted():
    module = nn.Linear(1, 1)
    module.compile(backend="eager")
    assert hooks.is_compiled(module)
    assert hooks.is_intercepted(module)


def test_a_module_with_a_forward_of_its_own_is_intercepted():
    module = nn.Linear(1, 1)
    module.forward = lambda x: x
    assert hooks.is_intercepted(module)


@pytest.mark.parametrize("registration", REGISTRATIONS)
def test_shared_hooks_are_removed_by_their_handles(registration):
    source, target = nn.Identity(), nn.Identity()
    handle = getattr(source, registration)(lambda *arguments: None)
    hooks.share_hooks(source, target)
    assert hooks.is_intercepted(target)
    handle.remove()
    assert not hooks.is_intercepted(target)


CONTEXTS = {
    "no gradients": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "meta device": lambda: torch.device("meta"),
    "fake tensors": FakeTensorMode,
}


@pytest.mark.parametrize("context", CONTEXTS)
def test_plainly_means_plainly(context):
    state = torch.get_rng_state()
    with CONTEXTS[context](), modes.plainly_on_cpu():
        x = torch.rand(2, 2, requires_grad=True)
        y = x @ x
        y.sum().backward()
        assert (y.dtype, y.device.type, type(y)) == (torch.float32, "cpu", torch.Tensor)
        assert y.isfinite().all()
        assert x.grad is not None
    assert torch.equal(torch.get_rng_state(), state)


def test_plainly_nothing_is_compiled():
    def fail(*arguments):
        raise AssertionError("compiled")

    function = torch.compile(lambda x: x + 1, backend=fail)
    with modes.plainly_on_cpu():
        assert function(torch.ones(1)) == 2


@pytest.mark.parametrize(("capability", "served"), [((7, 5), False), ((8, 0), True)])
def test_gpus_that_triton_does_not_compile_for_are_refused(capability, served, monkeypatch):
    # past the cache, which must not hold a made-up device
    monkeypatch.setattr(devices, "_looked_up_capability", lambda _: capability)
    monkeypatch.setattr(devices, "TRITON_IS_INSTALLED", True)
    reasons = devices.device_reasons(torch.device("cuda"))
    refusal = "the GPU has compute capability 7.5, the kernels need 8.0"
    assert reasons == ([] if served else [refusal])
