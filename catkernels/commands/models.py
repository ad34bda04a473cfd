"""The models that the commands know by name, and which of them a file of weights is of."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from catkernels.cat import VARIANTS, CATOptions
from catkernels.checkpoint import DoesNotFit, LoadReport, load_checkpoint, read_weights
from catkernels.digits import DIGITS

# As arguments of `CAT`.
MODELS: dict[str, CATOptions] = {"digits": DIGITS} | VARIANTS
DEFAULT_SIZE = 224
# What every CAT has.
_EMBEDDING = "patch_embed.proj.weight"


def default_size(model: str) -> int:
    """Side of the images that a model is made for."""
    size = MODELS[model].get("img_size", DEFAULT_SIZE)
    return size if isinstance(size, int) else size[0]


@dataclass(frozen=True)
class Checkpoint:
    """A file of weights, and the model that it is of.

    Attributes:
        path: the file.
        model: a name of `MODELS`.
        size: side of the images that the model was trained with.
        in_chans: their channels.
        num_classes: what it tells apart; 0 where the file holds a backbone, without a head.
        classes: their names; None where the file does not say.
    """

    path: Path
    model: str
    size: int
    in_chans: int
    num_classes: int
    classes: tuple[str, ...] | None

    @property
    def options(self) -> CATOptions:
        """The arguments of `CAT` that build the model."""
        return MODELS[self.model] | {
            "img_size": self.size,
            "in_chans": self.in_chans,
            "num_classes": self.num_classes,
        }

    def load_into(self, network: nn.Module, new_head: bool = False) -> LoadReport:
        """`load_checkpoint`, whose errors speak to somebody at the command line.

        Raises:
            ValueError: the weights are of another model.
        """
        try:
            return load_checkpoint(network, self.path, new_head=new_head)
        except DoesNotFit as error:
            raise ValueError(
                f"{error.fault}. It was trained at another size, or built with options that the "
                "command line does not have"
            ) from error


def read_checkpoint(path: Path, model: str | None = None) -> Checkpoint:
    """What a file of weights is of: which model by its weights, the rest as `train` wrote it.

    Args:
        path: what `load_checkpoint` reads.
        model: a name of `MODELS` that it has to be; None: any.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no weights, or those of another model.
    """
    weights = read_weights(path)
    names = [name for name in MODELS if _is_of(weights, name)]
    if not names:
        raise ValueError(f"{path.name} is of none of the models {', '.join(MODELS)}")
    (name,) = names
    if model not in (None, name):
        raise ValueError(f"{path.name} is of {name}, not of {model}: leave --model out")
    run = _training_options(path)
    head = weights.get("head.weight")
    return Checkpoint(
        path=path,
        model=name,
        size=run.get("size", default_size(name)),
        in_chans=weights[_EMBEDDING].shape[1],
        num_classes=0 if head is None else len(head),
        classes=tuple(run["classes"]) if "classes" in run else None,
    )


def _is_of(weights: Mapping[str, Tensor], model: str) -> bool:
    """Whether weights have the width and the blocks of a model, in which all of them differ."""
    one_a_block = re.compile(r"layers\.(\d+)\.cpsa_blocks\.\d+\.attn\.qkv\.weight")
    blocks = Counter(int(match[1]) for match in map(one_a_block.fullmatch, weights) if match)
    options = MODELS[model]
    return (
        _EMBEDDING in weights
        and len(weights[_EMBEDDING]) == options["embed_dim"]
        and blocks == dict(enumerate(options["depths"]))
    )


def _training_options(path: Path) -> dict[str, Any]:
    """What `train` wrote into the header of its weights, where this is such a file."""
    if path.suffix.lower() != ".safetensors":
        return {}
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        about = (file.metadata() or {}).get("catkernels", "{}")
    options: dict[str, Any] = json.loads(about).get("options", {})
    return options
