"""That the parts of somebody's module are all that there is to its call, and that it still is so.

What `patch` found out of a block, an attention or an MLP holds for its class as it was, and for the
attributes it had. A method that is replaced, or an attribute that only the module's own code reads,
ends it: such a module is called itself, as it would be in a model that is not patched.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from catkernels.torch_state.graphs import constant_in_graphs
from catkernels.torch_state.hooks import OWN_CALL

# What every module has of its own, and what says how it is called and not what it computes.
OF_EVERY_MODULE = OWN_CALL.union(vars(nn.Module()))

# What the classes that were found out have beside `nn.Module`'s, by name. A process that loads a
# patched model finds them as they are there.
_namespaces: dict[type[nn.Module], dict[str, object]] = {}


@dataclass(frozen=True)
class Trust:
    """That a module is its parts, as long as it stays as it was when this was made.

    Attributes:
        kind: its class.
        attributes: what it had of its own that only its own code reads; None: whatever it has.
    """

    kind: type[nn.Module]
    attributes: dict[str, object] | None = None

    @classmethod
    def of(cls, module: nn.Module, read: Collection[str] = ()) -> Trust:
        """Trust a module as it is, whose attributes ``read`` are read anew for each call."""
        kind = type(module)
        _namespaces[kind] = _namespace(kind)
        ignored = OF_EVERY_MODULE.union(read)
        return cls(kind, {name: v for name, v in vars(module).items() if name not in ignored})

    def holds_for(self, module: nn.Module) -> bool:
        """Whether ``module`` is of that class, and nothing of it or of the class was replaced."""
        if type(module) is not self.kind or not _is_as_it_was(self.kind):
            return False
        own, had = vars(module), self.attributes
        return had is None or (all(name in own for name in had) and self.allows(own))

    def allows(self, own: Mapping[str, object]) -> bool:
        """Whether the attributes ``own`` replace neither a method nor an attribute it had."""
        had = self.attributes or {}
        # older compilers of graphs know of a module's attributes only whether one is there
        return not any(name in own and name not in had for name in _namespaces[self.kind]) and all(
            _is_same(own[name], value) for name, value in had.items() if name in own
        )


@constant_in_graphs
def _is_as_it_was(kind: type[nn.Module]) -> bool:
    """Whether all that a class had when it was found out is still there."""
    known = _namespaces.get(kind)
    if known is None:
        known = _namespaces[kind] = _namespace(kind)
    return all(_own(kind, name) is value for name, value in known.items())


def _namespace(kind: type[nn.Module]) -> dict[str, object]:
    bases = (base for base in kind.__mro__ if base not in (nn.Module, object))
    names = {name for base in bases for name in vars(base) if not name.startswith("__")}
    names.add("__call__")
    values = {name: _own(kind, name) for name in names}
    # a class method is made anew each time it is asked for
    return {name: value for name, value in values.items() if _own(kind, name) is value}


def _own(kind: type[nn.Module], name: str) -> object:
    """What a class has by a name, unless every module has it: what traces replaces that for all."""
    value = getattr(kind, name, None)
    return None if value is getattr(nn.Module, name, None) else value


def _is_same(value: Any, former: Any) -> bool:
    """Whether an attribute is what it was. A file or `torch.export` rebuilds plain ones, equal."""
    if value is former:
        return True
    if type(value) is not type(former):
        return False
    if isinstance(value, dict):
        return value.keys() == former.keys() and all(_is_same(value[k], former[k]) for k in value)
    if isinstance(value, tuple | list):
        return len(value) == len(former) and all(map(_is_same, value, former))
    return isinstance(value, int | float | str) and bool(value == former)
