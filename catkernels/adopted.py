"""What a block of ours needs in order to stand in for another one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from catkernels.arguments import Backend, check_backend
from catkernels.modules import CPSA, IPSA
from catkernels.parts import AttentionParts, has_official_parts
from catkernels.torch_state.hooks import is_intercepted, share_hooks

if TYPE_CHECKING:
    from typing_extensions import Self

# The names under which official blocks keep the size of the map that their tokens are.
_MAP_SIZE = {"H", "W", "input_resolution"}


class StandIn(nn.Module):
    """A block around an attention that can take the place of somebody else's, and give it back.

    It then has the very children, hooks and mode of the other one, which it remembers.
    """

    # The names of the children that it takes over.
    CHILDREN: ClassVar[tuple[str, ...]] = ("attn",)

    attn: nn.Module
    # Of an attention that is none of ours.
    _backend: Backend = "auto"
    # The class of an official attention whose parts are all that there is to its call. One of
    # another class, which may be put around it at any time, is called itself.
    _read_class: type[nn.Module] | None = None
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
        for name in cls.CHILDREN:
            setattr(adopted, name, getattr(block, name))
        adopted.training = block.training
        adopted._read_class = type(adopted.attn) if has_official_parts(adopted.attn) else None
        # an `IPSA` or `CPSA` of the user's own has one already
        adopted._former_backend = adopted.backend
        # in a tuple, so that it is no child and its parameters are not listed twice
        adopted._adopted = (block,)
        return adopted

    @property
    def is_adopted(self) -> bool:
        """Whether this block stands in the place of another one."""
        return "_adopted" in vars(self)

    @property
    def original(self) -> nn.Module:
        """The block that `adopt` took over."""
        return self._adopted[0]

    def release(self) -> None:
        """Let `original` be what this block now is.

        That is its children, parameters and buffers, whenever they came, its mode, H and W.
        """
        block = self.original
        block.training = self.training
        self.backend = self._former_backend
        share_hooks(self, block)
        for registry in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            getattr(block, registry).update(getattr(self, registry))
        for name in _MAP_SIZE & vars(block).keys():
            setattr(block, name, getattr(self, name))

    @property
    def backend(self) -> Backend:
        """What the attention asks for. An `IPSA` or `CPSA` has one of its own, wrapped or not."""
        return next((attn.backend for attn in ours_within(self.attn)), self._backend)

    @backend.setter
    def backend(self, backend: Backend) -> None:
        self._backend = check_backend(backend)
        for attn in ours_within(self.attn):
            attn.backend = backend

    @property
    def knows_attention(self) -> bool:
        """Whether the attention is of a class whose call is known to be nothing but its parts."""
        return type(self.attn) in (IPSA, CPSA, self._read_class)

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
        try:
            return super().__getattr__(name)
        except AttributeError:
            if not self.is_adopted or name.startswith("__"):
                raise
            return getattr(self.original, name)


def ours_within(attn: nn.Module) -> Iterator[IPSA | CPSA]:
    """The attentions of ours that an attention is, or is put around."""
    return (module for module in attn.modules() if isinstance(module, IPSA | CPSA))
