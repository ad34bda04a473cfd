"""The models that the commands know by name, and which of them a file of weights is of."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from catkernels.cat import VARIANTS
from catkernels.checkpoint import DoesNotFit, LoadReport, load_checkpoint, read_weights
from catkernels.digits import DIGITS

# As arguments of `CAT`.
MODELS: dict[str, dict[str, Any]] = {"digits": DIGITS} | VARIANTS
DEFAULT_SIZE = 224


def default_size(model: str) -> int:
    """Side of the images that a model is made for."""
    size: int = MODELS[model].get("img_size", DEFAULT_SIZE)
    return size


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
        is_of_digits: whether it learned scikit-learn's digits.
    """

    path: Path
    model: str
    size: int
    in_chans: int
    num_classes: int
    classes: tuple[str, ...] | None = None
    is_of_digits: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of `CAT` that build the model."""
        return MODELS[self.model] | {
            "img_size": self.size,
            "in_chans": self.in_chans,
            "num_classes": self.num_classes,
        }

    def load_into(self, network: nn.Module, new_head: bool = False) -> LoadReport:
        """`load_checkpoint`, whose errors say what to do on the command line.

        Raises:
            ValueError: the weights are of another model.
        """
        try:
            return load_checkpoint(network, self.path, new_head=new_head)
        except DoesNotFit as error:
            raise ValueError(
                f"{error.fault}. Give the --model, and in training the --size, that "
                f"{self.path.name} was trained as"
            ) from error


def read_checkpoint(path: Path, model: str | None = None) -> Checkpoint:
    """What a file of weights is of: by its header, which `train` writes, or by its weights.

    Args:
        path: what `load_checkpoint` reads.
        model: a name of `MODELS`, for a file that does not say it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no weights of a CAT, or does not say of which and ``model`` is None.
    """
    weights = read_weights(path)
    embedding, head = weights.get("patch_embed.proj.weight"), weights.get("head.weight")
    if embedding is None or embedding.dim() != 4:
        raise ValueError(f"{path.name} holds no weights of a CAT: it has {', '.join(weights)[:60]}")
    run = _training_options(path)
    named = run.get("model")
    if model is None and named not in MODELS:
        raise ValueError(
            f"{path.name} does not say which model it is of: give --model ({', '.join(MODELS)})"
        )
    name = model or named
    # what a run was trained with says nothing of another model
    run = run if name == named else {}
    num_classes = 0 if head is None else len(head)
    return Checkpoint(
        path=path,
        model=name,
        size=run.get("size", default_size(name)),
        in_chans=embedding.shape[1],
        num_classes=num_classes,
        classes=tuple(run["classes"]) if "classes" in run else None,
        is_of_digits=run.get("data") == "digits",
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
