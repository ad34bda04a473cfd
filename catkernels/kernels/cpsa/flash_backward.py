"""CPSA backward of any number of patches, in blocks of queries and of keys, from their tokens.

The attention weights are computed again, twice: over the keys of each block of queries, then over
the queries of each block of keys. The first pass leaves what the second, and the sums that are the
gradients of the weights, need of the queries.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from catkernels.kernels.cpsa.flash_forward import (
    attend_keys,
    block_attention_grad,
    block_dropout,
    block_scores,
)
from catkernels.kernels.cpsa.launch import (
    PROGRAMS,
    TILE,
    Problem,
    flash_backward_launch,
    flash_weights_launch,
)
from catkernels.kernels.cpsa.tiles import COUNTS, PIXELS
from catkernels.kernels.cpsa.tokens import load_tokens, store_tokens
from catkernels.kernels.cpsa.weights import (
    MATRIX,
    PARTIAL,
    SCORE_CONSTANT,
    SCORE_SCALE,
    VALUE_CONSTANT,
    VALUE_SCALE,
    load_constants,
    load_matrix,
    store_gradients,
    sum_rows,
    sum_weighted_rows,
    zero_gradients,
)
from catkernels.kernels.launch import launched_as
from catkernels.kernels.tiles import dot

# What the first pass leaves of each query: the maximum of its scores and the inverse of the sum of
# their exponentials; the sum of its weights' gradients, weighted; and, where there is dropout, the
# gradient that all its weights share through Wp bv, and the sum of the weights that were kept.
MAXIMUM, NORMALISER, DELTA, CONSTANT_GRAD, TOTAL = (tl.constexpr(row) for row in range(5))
NUM_STATISTICS = 5


@triton.jit(do_not_specialize=COUNTS)
def cpsa_flash_query_backward_kernel(
    x_ptr,
    grad_ptr,
    matrices_ptr,
    constants_ptr,
    seed_ptr,
    query_ptr,
    query_grad_ptr,
    attended_ptr,
    attended_grad_ptr,
    statistics_ptr,
    num_sequences,
    num_channels,
    num_patches,
    drop_threshold,
    keep_scale,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Queries and what they attend to, again, and the gradients of both, for a block of queries.

    Grid: (sequences * blocks of queries,)
    Writes: query_ptr, query_grad_ptr, attended_ptr, attended_grad_ptr (B*C, P, 64); statistics_ptr
        (NUM_STATISTICS, B*C, P).
    """
    query_blocks = tl.cdiv(num_patches, BLOCK_Q)
    sequence = tl.program_id(0) // query_blocks
    first_query = tl.program_id(0) % query_blocks * BLOCK_Q
    score_scale = tl.load(constants_ptr + SCORE_SCALE)
    dropout = (seed_ptr, drop_threshold, keep_scale)
    # [BLOCK_Q, PIXELS]
    x = load_tokens(x_ptr, sequence, first_query, num_patches, BLOCK_Q)
    query = dot(x, load_matrix(matrices_ptr), PRECISION)
    query = (query + load_constants(constants_ptr + SCORE_CONSTANT)).to(x.dtype)
    grad = load_tokens(grad_ptr, sequence, first_query, num_patches, BLOCK_Q)
    value_matrix = tl.trans(load_matrix(matrices_ptr + MATRIX))
    attended_grad = dot(grad, value_matrix, PRECISION).to(x.dtype)
    # [BLOCK_Q]
    constant_grad = tl.zeros([BLOCK_Q], tl.float32)
    if seed_ptr is not None:
        value_constant = load_constants(constants_ptr + VALUE_CONSTANT)
        constant_grad = tl.sum(grad * value_constant, 1) / tl.load(constants_ptr + VALUE_SCALE)
    attended, total, statistics = attend_keys(
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
        BLOCK_K,
        PRECISION,
    )

    query_grad = tl.zeros([BLOCK_Q, PIXELS], tl.float32)
    for first_key in range(0, num_patches, BLOCK_K):
        # [BLOCK_K, PIXELS]
        keys = load_tokens(x_ptr, sequence, first_key, num_patches, BLOCK_K)
        factor = block_dropout(
            dropout, sequence, first_query, first_key, num_channels, BLOCK_Q, BLOCK_K
        )
        _, scores_grad = _attention_and_gradient(
            query,
            keys,
            attended_grad,
            statistics,
            constant_grad,
            score_scale,
            factor,
            first_key,
            num_patches,
            PRECISION,
        )
        query_grad += dot(scores_grad, keys, PRECISION)

    store_tokens(query_ptr, query, sequence, first_query, num_patches)
    store_tokens(query_grad_ptr, query_grad, sequence, first_query, num_patches)
    store_tokens(attended_ptr, attended, sequence, first_query, num_patches)
    store_tokens(attended_grad_ptr, attended_grad, sequence, first_query, num_patches)
    maximum, normaliser, delta = statistics
    row, inside = _statistic_row(sequence, first_query, num_patches, BLOCK_Q)
    size = tl.cast(num_sequences, tl.int64) * num_patches
    tl.store(statistics_ptr + MAXIMUM * size + row, maximum, mask=inside)
    tl.store(statistics_ptr + NORMALISER * size + row, normaliser, mask=inside)
    tl.store(statistics_ptr + DELTA * size + row, delta, mask=inside)
    if seed_ptr is not None:
        tl.store(statistics_ptr + CONSTANT_GRAD * size + row, constant_grad, mask=inside)
        tl.store(statistics_ptr + TOTAL * size + row, total, mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def cpsa_flash_key_backward_kernel(
    x_ptr,
    matrices_ptr,
    constants_ptr,
    seed_ptr,
    query_ptr,
    query_grad_ptr,
    attended_grad_ptr,
    statistics_ptr,
    dx_ptr,
    num_sequences,
    num_channels,
    num_patches,
    drop_threshold,
    keep_scale,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradient of a block of tokens: as keys, as values, and as the source of their queries.

    Grid: (sequences * blocks of keys,)
    Writes: dx_ptr (B*C, P, 64).
    """
    key_blocks = tl.cdiv(num_patches, BLOCK_K)
    sequence = tl.program_id(0) // key_blocks
    first_key = tl.program_id(0) % key_blocks * BLOCK_K
    score_scale = tl.load(constants_ptr + SCORE_SCALE)
    size = tl.cast(num_sequences, tl.int64) * num_patches
    dropout = (seed_ptr, drop_threshold, keep_scale)
    # [BLOCK_K, PIXELS]
    keys = load_tokens(x_ptr, sequence, first_key, num_patches, BLOCK_K)
    score_side = tl.zeros([BLOCK_K, PIXELS], tl.float32)
    value_side = tl.zeros([BLOCK_K, PIXELS], tl.float32)
    for first_query in range(0, num_patches, BLOCK_Q):
        # [BLOCK_Q, PIXELS]
        query = load_tokens(query_ptr, sequence, first_query, num_patches, BLOCK_Q)
        attended_grad = load_tokens(attended_grad_ptr, sequence, first_query, num_patches, BLOCK_Q)
        # [BLOCK_Q]; past the last patch all is zero, so that such a query adds nothing
        row, inside = _statistic_row(sequence, first_query, num_patches, BLOCK_Q)
        maximum = tl.load(statistics_ptr + MAXIMUM * size + row, mask=inside, other=0.0)
        normaliser = tl.load(statistics_ptr + NORMALISER * size + row, mask=inside, other=0.0)
        delta = tl.load(statistics_ptr + DELTA * size + row, mask=inside, other=0.0)
        constant_grad = tl.zeros([BLOCK_Q], tl.float32)
        if seed_ptr is not None:
            constant_grad = tl.load(
                statistics_ptr + CONSTANT_GRAD * size + row, mask=inside, other=0.0
            )
        statistics = (maximum, normaliser, delta)
        factor = block_dropout(
            dropout, sequence, first_query, first_key, num_channels, BLOCK_Q, BLOCK_K
        )
        # [BLOCK_Q, BLOCK_K]
        attention, scores_grad = _attention_and_gradient(
            query,
            keys,
            attended_grad,
            statistics,
            constant_grad,
            score_scale,
            factor,
            first_key,
            num_patches,
            PRECISION,
        )
        value_side += dot(tl.trans(attention), attended_grad, PRECISION)
        score_side += dot(tl.trans(scores_grad), query, PRECISION)

    query_grad = load_tokens(query_grad_ptr, sequence, first_key, num_patches, BLOCK_K)
    score_side += dot(query_grad, tl.trans(load_matrix(matrices_ptr)), PRECISION)
    dx = (value_side + score_side * score_scale) * tl.load(constants_ptr + VALUE_SCALE)
    store_tokens(dx_ptr, dx, sequence, first_key, num_patches)


@triton.jit(do_not_specialize=COUNTS)
def cpsa_flash_weights_backward_kernel(
    x_ptr,
    grad_ptr,
    seed_ptr,
    query_grad_ptr,
    attended_ptr,
    statistics_ptr,
    partials_ptr,
    num_sequences,
    num_patches,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradients of the weights: dA = x^T dq and dM = attended^T grad, and of the constants.

    Grid: (programs,), each of which takes every programs-th block of patches
    Writes: partials_ptr (programs, PARTIAL), each program's sum.
    """
    blocks = tl.cdiv(num_patches, ROWS)
    gradients = zero_gradients()
    for block in tl.range(tl.program_id(0), num_sequences * blocks, tl.num_programs(0)):
        sequence = block // blocks
        first_patch = block % blocks * ROWS
        # [ROWS, PIXELS]
        x = load_tokens(x_ptr, sequence, first_patch, num_patches, ROWS)
        grad = load_tokens(grad_ptr, sequence, first_patch, num_patches, ROWS)
        query_grad = load_tokens(query_grad_ptr, sequence, first_patch, num_patches, ROWS)
        attended = load_tokens(attended_ptr, sequence, first_patch, num_patches, ROWS)
        score_grad, value_grad, score_constant, value_constant, out_constant = gradients
        score_grad += dot(tl.trans(x), query_grad, PRECISION)
        value_grad += dot(tl.trans(attended), grad, PRECISION)
        score_constant += sum_rows(query_grad)
        out_constant += sum_rows(grad)
        if seed_ptr is not None:
            row, inside = _statistic_row(sequence, first_patch, num_patches, ROWS)
            size = tl.cast(num_sequences, tl.int64) * num_patches
            total = tl.load(statistics_ptr + TOTAL * size + row, mask=inside, other=0.0)
            value_constant += sum_weighted_rows(grad, total[:, None])
        gradients = (score_grad, value_grad, score_constant, value_constant, out_constant)
    store_gradients(partials_ptr + tl.program_id(0) * PARTIAL, gradients, seed_ptr, True, True)


@triton.jit
def _statistic_row(sequence, first_patch, num_patches, ROWS: tl.constexpr):
    """Where a row of the statistics holds those of some patches (ROWS,), and their mask."""
    patch = first_patch + tl.arange(0, ROWS)
    return tl.cast(sequence, tl.int64) * num_patches + patch, patch < num_patches


@triton.jit
def _attention_and_gradient(
    query,
    keys,
    attended_grad,
    statistics,
    constant_grad,
    score_scale,
    factor,
    first_key,
    num_patches,
    PRECISION: tl.constexpr,
):
    """Attention weights (BLOCK_Q, BLOCK_K) after dropout, and the gradient of the scores."""
    maximum, normaliser, delta = statistics
    scores = block_scores(query, keys, score_scale, first_key, num_patches, PRECISION)
    attention = tl.exp2(scores - maximum[:, None]) * normaliser[:, None]
    attention_grad = block_attention_grad(keys, attended_grad, constant_grad, factor, PRECISION)
    scores_grad = attention * (attention_grad - delta[:, None])
    return (attention * factor).to(keys.dtype), scores_grad.to(keys.dtype)


def flash_backward(
    tokens: Tensor,
    grad: Tensor,
    problem: Problem,
    attention: dict,
    needs_x: bool,
    needs_weights: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of `flash_forward`.

    Args:
        tokens: (B*C, P, 64).
        grad: gradient (B*C, P, 64) of the output.
        problem, attention: as in the forward pass.
        needs_x, needs_weights: which gradients to compute.

    Returns:
        The gradient (B*C, P, 64) of the tokens, and of the weights the sums (programs, PARTIAL)
        of each program, or None.
    """
    launch = launched_as(flash_backward_launch, problem)
    sequences, patches = problem.num_sequences, problem.num_patches
    query, query_grad, attended, attended_grad = (torch.empty_like(tokens) for _ in range(4))
    statistics = tokens.new_empty((NUM_STATISTICS, sequences, patches), dtype=torch.float32)
    shared = {"num_sequences": sequences, **problem.token_arguments(), **attention}
    cpsa_flash_query_backward_kernel[(sequences * triton.cdiv(patches, launch.block_q),)](
        x_ptr=tokens,
        grad_ptr=grad,
        query_ptr=query,
        query_grad_ptr=query_grad,
        attended_ptr=attended,
        attended_grad_ptr=attended_grad,
        statistics_ptr=statistics,
        **shared,
        **launch.constants(),
    )
    dx = partials = None
    if needs_x:
        dx = torch.empty_like(tokens)
        cpsa_flash_key_backward_kernel[(sequences * triton.cdiv(patches, launch.block_k),)](
            x_ptr=tokens,
            query_ptr=query,
            query_grad_ptr=query_grad,
            attended_grad_ptr=attended_grad,
            statistics_ptr=statistics,
            dx_ptr=dx,
            **shared,
            **launch.constants(),
        )
    if needs_weights:
        weights_launch = launched_as(flash_weights_launch, problem)
        blocks = sequences * triton.cdiv(patches, TILE)
        partials = tokens.new_empty((min(PROGRAMS, blocks), PARTIAL.value), dtype=torch.float32)
        cpsa_flash_weights_backward_kernel[(partials.shape[0],)](
            x_ptr=tokens,
            grad_ptr=grad,
            seed_ptr=attention["seed_ptr"],
            query_grad_ptr=query_grad,
            attended_ptr=attended,
            statistics_ptr=statistics,
            partials_ptr=partials,
            num_sequences=sequences,
            num_patches=patches,
            ROWS=TILE,
            PRECISION=problem.precision,
            **weights_launch.constants(),
        )
    return dx, partials
