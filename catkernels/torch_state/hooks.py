"""What calling a module does beyond what its class says.

PyTorch keeps a module's hooks in dictionaries of the instance, those of all modules in a file of
its own, and how a module was compiled in an attribute. Nothing else in this package names them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules import module as calls

# What the classes do whose calls are computed here in other ways.
_FORWARDS = {
    kind: kind.forward
    for kind in (nn.Linear, nn.LayerNorm, nn.GELU, nn.Softmax, nn.Dropout, nn.Identity, nn.Conv2d)
}
# How the names end of all dictionaries that hold hooks, those of state_dicts among them.
_HOOKS = ("_hooks", "_hooks_with_kwargs", "_hooks_always_called")
# Set by a backward hook's registration, beside the dictionaries.
_FLAG = "_is_full_backward_hook"
# What an instance may have of its own that says how it is called.
OWN_CALL = frozenset({"forward", "_compiled_call_impl"})


def is_intercepted(module: nn.Module) -> bool:
    """Whether calling ``module`` does more than its class says, or than PyTorch's class says.

    That may be hooks, its own or those of all modules, a forward of its own or one that was put in
    the place of a whole class's, or having been compiled by itself.
    """
    own, kind = vars(module), type(module)
    # without a loop: this is asked of every part of a block in every call
    return bool(
        own["_forward_pre_hooks"]
        or own["_forward_hooks"]
        or own["_backward_pre_hooks"]
        or own["_backward_hooks"]
        or "forward" in own
        or own.get("_compiled_call_impl") is not None
        or (kind in _FORWARDS and kind.forward is not _FORWARDS[kind])
        or has_global_hooks()
    )


def has_global_hooks() -> bool:
    """Whether somebody listens to the calls of all modules there are."""
    return calls._has_any_global_hook()


def is_compiled(module: nn.Module) -> bool:
    """Whether ``module.compile()`` was called."""
    return module._compiled_call_impl is not None


def share_hooks(source: nn.Module, target: nn.Module) -> None:
    """Let ``target`` hold the very dictionaries of ``source``, so that handles still remove."""
    for name, value in vars(source).items():
        if name == _FLAG or name.endswith(_HOOKS):
            setattr(target, name, value)


def wraps_compiled(module: nn.Module) -> bool:
    """Whether ``module`` is what `torch.compile` put around another one."""
    # by its name: to import the class is to import the compiler
    return type(module).__name__ == "OptimizedModule"


@contextmanager
def global_hooks_set_aside() -> Iterator[None]:
    """Within it, no hook that was registered for all modules sees a module made or called."""
    names = [name for name in vars(calls) if name.startswith("_global") and name.endswith(_HOOKS)]
    held = {name: getattr(calls, name) for name in names}
    try:
        for name in names:
            setattr(calls, name, OrderedDict())
        yield
    finally:
        for name, hooks in held.items():
            setattr(calls, name, hooks)
