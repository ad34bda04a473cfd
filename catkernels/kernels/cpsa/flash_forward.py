"""CPSA forward of any number of patches, in blocks of queries and of keys, from their tokens.

No attention matrix is stored: each query keeps a running maximum and sum over its keys.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from catkernels.kernels.cpsa.launch import Problem, flash_forward_launch
from catkernels.kernels.cpsa.tiles import COUNTS, PIXELS, dropout_factor
from catkernels.kernels.cpsa.tokens import load_tokens, store_tokens
from catkernels.kernels.cpsa.weights import (
    BIAS,
    MATRIX,
    SCORE_CONSTANT,
    SCORE_SCALE,
    VALUE_CONSTANT,
    VALUE_SCALE,
    load_constants,
    load_matrix,
)
from catkernels.kernels.launch import launched_as
from catkernels.kernels.tiles import LOG2E, dot


@triton.jit(do_not_specialize=COUNTS)
def cpsa_flash_forward_kernel(
    x_ptr,
    matrices_ptr,
    constants_ptr,
    seed_ptr,
    out_ptr,
    num_channels,
    num_patches,
    drop_threshold,
    keep_scale,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out = softmax((x A + u) x^T) x M + c for a block of a sequence's patches.

    Grid: (sequences * blocks of queries,)
    Writes: out_ptr (B*C, P, 64).
    """
    query_blocks = tl.cdiv(num_patches, BLOCK_Q)
    sequence = tl.program_id(0) // query_blocks
    first_query = tl.program_id(0) % query_blocks * BLOCK_Q
    dropout = (seed_ptr, drop_threshold, keep_scale)
    # [BLOCK_Q, PIXELS]
    x = load_tokens(x_ptr, sequence, first_query, num_patches, BLOCK_Q)
    query = dot(x, load_matrix(matrices_ptr), PRECISION)
    query = (query + load_constants(constants_ptr + SCORE_CONSTANT)).to(x.dtype)
    score_scale = tl.load(constants_ptr + SCORE_SCALE)
    attended, total, _ = attend_keys(
        query,
        x_ptr,
        score_scale,
        dropout,
        sequence,
        first_query,
        num_channels,
        num_patches,
        attended_grad=None,
        constant_grad=None,
        BLOCK_K=BLOCK_K,
        PRECISION=PRECISION,
    )
    out = dot(attended.to(x.dtype), load_matrix(matrices_ptr + MATRIX), PRECISION)
    value_constant = load_constants(constants_ptr + VALUE_CONSTANT)
    if seed_ptr is not None:
        value_constant *= total[:, None]
    out = out * tl.load(constants_ptr + VALUE_SCALE) + value_constant
    out += load_constants(constants_ptr + BIAS)
    store_tokens(out_ptr, out, sequence, first_query, num_patches)


@triton.jit
def attend_keys(
    query,
    x_ptr,
    score_scale,
    dropout,
    sequence,
    first_query,
    num_channels,
    num_patches,
    attended_grad,
    constant_grad,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attention of queries (BLOCK_Q, PIXELS) to all the tokens of their sequence.

    Args:
        attended_grad: (BLOCK_Q, PIXELS), the gradient of what they attend to; None in the forward
            pass.
        constant_grad: (BLOCK_Q,), what `block_attention_grad` adds to it.

    Returns:
        attended: (BLOCK_Q, PIXELS).
        total: (BLOCK_Q,), the sum of the weights that dropout left; of no use without dropout.
        statistics: each (BLOCK_Q,), the maximum of the scores and the inverse of the sum of their
            exponentials (their one logarithm would round away what large scores leave of a
            weight), and the weighted sum of the weights' gradients.
    """
    BLOCK_Q: tl.constexpr = query.shape[0]
    maximum = tl.full([BLOCK_Q], -float("inf"), tl.float32)
    exp_sum = tl.zeros([BLOCK_Q], tl.float32)
    kept_sum = tl.zeros([BLOCK_Q], tl.float32)
    delta = tl.zeros([BLOCK_Q], tl.float32)
    attended = tl.zeros([BLOCK_Q, PIXELS], tl.float32)
    for first_key in range(0, num_patches, BLOCK_K):
        # [BLOCK_K, PIXELS]
        keys = load_tokens(x_ptr, sequence, first_key, num_patches, BLOCK_K)
        # [BLOCK_Q, BLOCK_K]
        scores = block_scores(query, keys, score_scale, first_key, num_patches, PRECISION)
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        attention = tl.exp2(scores - new_maximum[:, None])
        factor = block_dropout(
            dropout, sequence, first_query, first_key, num_channels, BLOCK_Q, BLOCK_K
        )
        rescale = tl.exp2(maximum - new_maximum)
        exp_sum = exp_sum * rescale + tl.sum(attention, 1)
        if attended_grad is not None:
            attention_grad = block_attention_grad(
                keys, attended_grad, constant_grad, factor, PRECISION
            )
            delta = delta * rescale + tl.sum(attention * attention_grad, 1)
        attention *= factor
        kept_sum = kept_sum * rescale + tl.sum(attention, 1)
        attended = attended * rescale[:, None] + dot(attention.to(keys.dtype), keys, PRECISION)
        maximum = new_maximum
    normaliser = 1.0 / exp_sum
    statistics = (maximum, normaliser, delta * normaliser)
    return attended * normaliser[:, None], kept_sum * normaliser, statistics


@triton.jit
def block_scores(query, keys, score_scale, first_key, num_patches, PRECISION: tl.constexpr):
    """Scores (BLOCK_Q, BLOCK_K) in units of log 2, -inf for keys past the last patch."""
    key = first_key + tl.arange(0, keys.shape[0])
    scores = dot(query, tl.trans(keys), PRECISION) * (score_scale * LOG2E)
    return tl.where((key < num_patches)[None, :], scores, -float("inf"))


@triton.jit
def block_attention_grad(keys, attended_grad, constant_grad, factor, PRECISION: tl.constexpr):
    """The gradient of attention weights (BLOCK_Q, BLOCK_K) before dropout."""
    attention_grad = dot(attended_grad, tl.trans(keys), PRECISION)
    return (attention_grad + constant_grad[:, None]) * factor


@triton.jit
def block_dropout(
    dropout,
    sequence,
    first_query,
    first_key,
    num_channels,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`dropout_factor` of a block (BLOCK_Q, BLOCK_K)."""
    query = first_query + tl.arange(0, BLOCK_Q)
    channel = sequence % num_channels + tl.zeros([BLOCK_Q], tl.int32)
    key = tl.arange(0, BLOCK_K)
    return dropout_factor(dropout, sequence // num_channels, channel, query, first_key, key)


def flash_forward(tokens: Tensor, problem: Problem, attention: dict) -> Tensor:
    """The outputs (B*C, P, 64) of tokens (B*C, P, 64)."""
    out = torch.empty_like(tokens)
    launch = launched_as(flash_forward_launch, problem)
    blocks = triton.cdiv(problem.num_patches, launch.block_q)
    cpsa_flash_forward_kernel[(problem.num_sequences * blocks,)](
        x_ptr=tokens,
        out_ptr=out,
        **problem.token_arguments(),
        **attention,
        **launch.constants(),
    )
    return out
