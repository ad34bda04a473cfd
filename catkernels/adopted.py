"""What a block of ours needs in order to stand in for another one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from catkernels.arguments import Backend, check_backend
from catkernels.modules import CPSA, IPSA
from catkernels.parts import AttentionParts, has_official_parts, is_our_index
from catkernels.torch_state.hooks import is_intercepted, share_hooks
from catkernels.torch_state.tensors import values_can_be_read, version
from catkernels.trust import OF_EVERY_MODULE, Trust

if TYPE_CHECKING:
    from typing_extensions import Self

# The names under which official blocks keep the size of the map that their tokens are.
_MAP_SIZE = frozenset({"H", "W", "input_resolution"})
# What both blocks hold the very same dictionaries of: children, parameters and buffers, whenever
# they come.
_REGISTRIES = ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set")
# What an attention's own code reads and ours reads as well, anew for each call.
_READ = ("num_heads", "scale", "rpe")


class StandIn(nn.Module):
    """A block around an attention that can take the place of somebody else's, and give it back.

    It then has the very children, hooks and mode of the other one, which it remembers.
    """

    # The names of the children that it takes over.
    CHILDREN: ClassVar[tuple[str, ...]] = ("attn",)
    # What of the other one's attributes is read anew for each call, of this block or of that.
    READ: ClassVar[frozenset[str]] = _MAP_SIZE | {"attn_type", "patch_size"}
    # What this one has for itself.
    OWN: ClassVar[frozenset[str]] = frozenset(
        {
            "_backend",
            "_former_backend",
            "_adopted",
            "_attn_trust",
            "_original_trust",
            "_index",
            "_released",
        }
    )

    attn: nn.Module
    patch_size: int
    # Of an attention that is none of ours.
    _backend: Backend = "auto"
    # That an official attention is its parts. One of another class, which may be put around it at
    # any time, or one that was changed, is called itself.
    _attn_trust: Trust | None = None
    # Its index into the bias table as last looked at, at which version, and whether it is ours.
    _index: tuple[Tensor | None, int, bool] = (None, 0, True)
    # That the other block does what this one does; None: it is not asked.
    _original_trust: Trust | None = None
    _released = False
    _former_backend: Backend
    _adopted: tuple[nn.Module]

    @classmethod
    def adopt(cls, block: nn.Module) -> Self:
        """A block with the very children, hooks and mode of another one, which it remembers."""
        adopted = cls.__new__(cls)
        nn.Module.__init__(adopted)
        share_hooks(block, adopted)
        for name in _MAP_SIZE & vars(block).keys():
            setattr(adopted, name, getattr(block, name))
        for name in _REGISTRIES:
            vars(adopted)[name] = vars(block)[name]
        adopted.training = block.training
        if has_official_parts(adopted.attn):
            adopted._attn_trust = Trust(type(adopted.attn))
        # an `IPSA` or `CPSA` of the user's own has one already
        adopted._former_backend = adopted.backend
        # in a tuple, so that it is no child and its parameters are not listed twice
        adopted._adopted = (block,)
        return adopted

    def trust_original(self) -> None:
        """Take `original` and its attention for what they are now, and no longer once they change.

        A block that was changed is called itself, and so is an attention.
        """
        self._original_trust = Trust.of(self.original, self.READ)
        if self._attn_trust is not None:
            self._attn_trust = Trust.of(self.attn, _READ)

    @property
    def is_adopted(self) -> bool:
        """Whether this block stands in the place of another one."""
        return "_adopted" in vars(self)

    @property
    def original(self) -> nn.Module:
        """The block that `adopt` took over."""
        return self._adopted[0]

    def release(self) -> None:
        """Let `original` be what this block now is: its mode, the map's size, what was set on it.

        Children, parameters and buffers it has already.
        """
        self.backend = self._former_backend
        self._tell_original()
        if "forward" in vars(self):
            self.original.forward = vars(self)["forward"]
        self._original_trust, self._released = None, True

    def _tell_original(self) -> None:
        """Let `original` have what was set on this block since `adopt`."""
        block = self.original
        share_hooks(self, block)
        block.training = self.training
        for name, value in vars(self).items():
            if name in _MAP_SIZE and name not in vars(block):
                continue
            if name not in OF_EVERY_MODULE and name not in self.OWN:
                setattr(block, name, value)

    @property
    def backend(self) -> Backend:
        """What the attention asks for. An `IPSA` or `CPSA` has one of its own, wrapped or not."""
        attn, trust = self.attn, self._attn_trust
        if isinstance(attn, IPSA | CPSA):
            return attn.backend
        if trust is not None and type(attn) is trust.kind:
            # there is none of ours within, and to look for it would take as long as a launch
            return self._backend
        return next((ours.backend for ours in ours_within(attn)), self._backend)

    @backend.setter
    def backend(self, backend: Backend) -> None:
        self._backend = check_backend(backend)
        for attn in ours_within(self.attn):
            attn.backend = backend

    @property
    def original_was_changed(self) -> bool:
        """Whether the other block's class, or what it or this block has, says another thing now."""
        trust = self._original_trust
        if trust is None:
            return self._released
        # what is set on this block is meant for the other one
        return not (
            trust.holds_for(self.original)
            and trust.allows(vars(self))
            and "forward" not in vars(self.original)
        )

    def call_original(self, x: Tensor) -> Tensor:
        """What the other block makes of ``x``, with the present children, mode and attributes."""
        if self._released:
            # what was put around this block's forward is now around the other one's, and calls this
            return type(self.original).forward(self.original, x)
        self._tell_original()
        return self.original.forward(x)

    @property
    def knows_attention(self) -> bool:
        """Whether the attention is of a class whose call is known to be nothing but its parts."""
        attn, trust = self.attn, self._attn_trust
        if type(attn) in (IPSA, CPSA):
            return True
        return trust is not None and trust.holds_for(attn) and self._orders_table_as_ours(attn)

    @property
    def attention_was_changed(self) -> bool:
        """Whether an attention that was known to be its parts is so no longer."""
        trust = self._attn_trust
        return trust is not None and type(self.attn) is trust.kind and not self.knows_attention

    def _orders_table_as_ours(self, attn: nn.Module) -> bool:
        """Whether the index into the bias table, if there is one, has the values that ours has."""
        known, known_version, is_ours = self._index
        if torch.compiler.is_compiling():
            return is_ours
        index: Tensor | None = getattr(attn, "relative_position_index", None)
        if index is None:
            return is_ours
        if index is known and version(index) == known_version:
            return is_ours
        if values_can_be_read(index):
            is_ours = is_our_index(index, self.patch_size)
            self._index = (index, version(index), is_ours)
        return is_ours

    def read_attention(self) -> AttentionParts | None:
        """What the attention consists of, or None where its call may do more than these parts."""
        if not self.knows_attention or is_intercepted(self.attn):
            return None
        parts = AttentionParts.of(self.attn)
        return parts if parts.is_arithmetic else None

    @property
    def attention_takes_tokens(self) -> bool:
        """Whether the attention expects what the official blocks give theirs, or else a map.

        That is partitioned tokens. In the place of an official block any attention expects them; in
        a block of ours an official one does, whatever is put around it.
        """
        if self.is_adopted:
            return True
        official = any(has_official_parts(module) for module in self.attn.modules())
        return official and not any(ours_within(self.attn))

    def __getattr__(self, name: str) -> Any:
        """What an adopted block lacks, such as the official `flops`, the other one has."""
        # first what is asked for most
        children = vars(self).get("_modules", ())
        if name in children:
            return children[name]
        try:
            return super().__getattr__(name)
        except AttributeError:
            if not self.is_adopted or name.startswith("__"):
                raise
        if name not in vars(self.original) and not torch.compiler.is_compiling():
            # a method or a property, which is to see what this block is now
            self._tell_original()
        return getattr(self.original, name)


def ours_within(attn: nn.Module) -> Iterator[IPSA | CPSA]:
    """The attentions of ours that an attention is, or is put around."""
    return (module for module in attn.modules() if isinstance(module, IPSA | CPSA))
