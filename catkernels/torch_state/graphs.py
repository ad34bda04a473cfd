"""What a compiled graph may take for granted."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Question = TypeVar("Question", bound=Callable[..., object])


def constant_in_graphs(question: Question) -> Question:
    """Let a graph that asks ``question`` keep the answer of when it was made.

    What `torch.compiler.assume_constant_result` does, which would import the compiler.
    """
    question.__dict__["_dynamo_marked_constant"] = True
    return question
