"""LAMB: each phase is a launch over all tensors, after a launch that computes factors of whole tensors.

A program updates a chunk of one tensor. Sums of chunks are added by a program per tensor, in float64 and in a fixed
order. Traffic for each float32 element: 24 bytes in update, 16 in apply.
"""

import torch
import triton
import triton.language as tl

from ..reference.lamb import DEEPSPEED_RATIO
from ..tuning import entry
from ..tuning.calls import BETAS_AND_EPS
from ._launch import device_guard
from ._tensor_table import (
    Table,
    as_float,
    buffers_at,
    chunk_at,
    draw_tensors,
    is_set,
    lanes_at,
    load_floats,
    logs,
    rounded,
    store_floats,
    store_gradient_factor,
    store_keys,
    updated_moments,
)

PARTIALS = 256
"""Partial sums that a program adds at a time."""
_LOWEST, _HIGHEST = (tl.constexpr(bound) for bound in DEEPSPEED_RATIO)

_ENTRIES = [entry(CHUNK=8192, BLOCK=1024, num_warps=4)]
CONFIGS = {80: {"lamb_update": _ENTRIES, "lamb_apply": _ENTRIES}}
"""Launch configurations by compute capability; a GPU has those of the highest up to its own."""


@triton.jit(do_not_specialize=["count"])
def prepare_kernel(
    pointers,
    decays,
    lrs,
    seeds,
    squared_norms,
    grad_scale,
    found_inf,
    factors,
    keys,
    log_beta1: tl.float64,
    log_beta2: tl.float64,
    count,
    LISTS: tl.constexpr,
    NVLAMB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Factors of each tensor; the update phase has no norms and increments steps."""
    COUNTS: tl.constexpr = squared_norms is None
    log_betas = log_beta1, log_beta2
    tensor, inside, step, bias1, bias2 = lanes_at(pointers, count, found_inf, log_betas, LISTS, COUNTS, BLOCK)
    weight_decay = tl.load(decays + tensor, mask=inside, other=0.0)
    store_floats(factors, 4 * tensor, weight_decay, inside)
    if NVLAMB:
        store_floats(factors, 4 * tensor + 1, 1.0 / bias1, inside)
        store_floats(factors, 4 * tensor + 2, 1.0 / bias2, inside)
    if squared_norms is not None:
        factor = trust_ratio(squared_norms, tensor, inside)
        if NVLAMB:
            factor = tl.where(weight_decay != 0.0, factor, 1.0)
        else:
            factor = tl.where(factor < _LOWEST, _LOWEST, tl.where(factor > _HIGHEST, _HIGHEST, factor))
            factor = factor * tl.sqrt(bias2) / bias1
        factor = factor * tl.load(lrs + tensor, mask=inside, other=0.0)
        store_floats(factors, 4 * tensor + 3, factor, inside)
    else:
        store_gradient_factor(factors + 4 * tensor + 3, grad_scale, inside)
    if keys is not None:
        store_keys(keys, seeds, tensor, step, inside)


@triton.jit
def trust_ratio(squared_norms, tensor, inside):
    w = tl.sqrt_rn(load_floats(squared_norms, 2 * tensor, inside)).to(tl.float64)
    u = tl.sqrt_rn(load_floats(squared_norms, 2 * tensor + 1, inside)).to(tl.float64)
    return tl.where((w > 0.0) & (u > 0.0), w / u, 1.0)


@triton.jit
def direction(w, m, v, factors, tensor, eps, NVLAMB: tl.constexpr):
    if NVLAMB:
        m, v = m * tl.load(factors + 4 * tensor + 1), v * tl.load(factors + 4 * tensor + 2)
    return tl.div_rn(m, tl.sqrt_rn(v) + eps) + w * tl.load(factors + 4 * tensor)


@triton.jit(do_not_specialize=["first"])
def update_kernel(
    pointers,
    chunks,
    first,
    factors,
    partials,
    found_inf,
    beta1: tl.float64,
    beta2: tl.float64,
    eps: tl.float32,
    NVLAMB: tl.constexpr,
    PARAM: tl.constexpr,
    M: tl.constexpr,
    V: tl.constexpr,
    GRAD: tl.constexpr,
    FITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    position = first + tl.program_id(0)
    tensor, begin, end = chunk_at(chunks, position, FITS)
    param, exp_avg, exp_avg_sq, grad = buffers_at(pointers + 5 * tensor + 1, (PARAM, M, V, GRAD), FITS)
    changes, grad_factor = not is_set(found_inf), tl.load(factors + 4 * tensor + 3)
    param_sum, direction_sum = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(begin, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < end
        w, m, v = load_floats(param, i, inside), load_floats(exp_avg, i, inside), load_floats(exp_avg_sq, i, inside)
        g = load_floats(grad, i, inside & changes) * grad_factor
        new_m, new_v = updated_moments(g, m, v, beta1, beta2)
        store_floats(exp_avg, i, new_m, inside & changes)
        store_floats(exp_avg_sq, i, new_v, inside & changes)
        # Norms are computed from the rounded moments, as in the apply phase.
        m, v = tl.where(changes, new_m.to(M).to(tl.float32), m), tl.where(changes, new_v.to(V).to(tl.float32), v)
        u = tl.where(inside, direction(w, m, v, factors, tensor, eps, NVLAMB), 0.0)
        param_sum += w * w
        direction_sum += u * u
    tl.store(partials + 2 * position, tl.sum(param_sum))
    tl.store(partials + 2 * position + 1, tl.sum(direction_sum))


@triton.jit
def norms_kernel(partials, spans, squared_norms, BLOCK: tl.constexpr):
    tensor = tl.program_id(0)
    last = tl.load(spans + 2 * tensor + 1)
    param_sum, direction_sum = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for first in range(tl.load(spans + 2 * tensor), last, BLOCK):
        i = first + tl.arange(0, BLOCK)
        param_sum += tl.load(partials + 2 * i, mask=i < last, other=0.0)
        direction_sum += tl.load(partials + 2 * i + 1, mask=i < last, other=0.0)
    store_floats(squared_norms, 2 * tensor, tl.sum(param_sum), True)
    store_floats(squared_norms, 2 * tensor + 1, tl.sum(direction_sum), True)


@triton.jit(do_not_specialize=["first"])
def apply_kernel(
    pointers,
    chunks,
    first,
    factors,
    keys,
    found_inf,
    eps: tl.float32,
    NVLAMB: tl.constexpr,
    PARAM: tl.constexpr,
    M: tl.constexpr,
    V: tl.constexpr,
    FITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if is_set(found_inf):
        return
    # In reverse, as the last chunks of update may still be in the cache.
    position = first + tl.num_programs(0) - 1 - tl.program_id(0)
    tensor, begin, end = chunk_at(chunks, position, FITS)
    param, exp_avg, exp_avg_sq = buffers_at(pointers + 4 * tensor + 1, (PARAM, M, V), FITS)
    factor = tl.load(factors + 4 * tensor + 3)
    for start in range(begin, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < end
        w, m, v = load_floats(param, i, inside), load_floats(exp_avg, i, inside), load_floats(exp_avg_sq, i, inside)
        w -= factor * direction(w, m, v, factors, tensor, eps, NVLAMB)
        store_floats(param, i, rounded(w, i, keys, tensor), inside)


def lamb_update(
    params, grads, exp_avgs, exp_avg_sqs, steps, weight_decays, betas_and_eps, nvlamb, grad_scale, found_inf
):
    (*betas, eps), skip, count = betas_and_eps, as_float(found_inf), len(params)
    with device_guard(params[0]):
        table = Table("lamb_update", steps, PARAM=params, M=exp_avgs, V=exp_avg_sqs, GRAD=grads)
        decays, factors = table.numbers(weight_decays, dtype=torch.float64), table.room(count, 4)
        partials, squared_norms = table.room(len(table.layout.chunks), 2), table.room(count, 2)
        arguments = decays, None, None, None, as_float(grad_scale), skip, factors, None, *logs(*betas)
        table.prepare(prepare_kernel, *arguments, LISTS=5, NVLAMB=nvlamb)
        table.launch(update_kernel, factors, partials, skip, *betas, eps, NVLAMB=nvlamb)
        norms_kernel[(count,)](partials, table.layout.spans, squared_norms, PARTIALS, enable_fp_fusion=False)
        table.return_copies("M", "V")
    return squared_norms


def lamb_apply(
    params, exp_avgs, exp_avg_sqs, steps, norms, lrs, weight_decays, betas_and_eps, nvlamb, found_inf, seeds,
    first_elements, device_lrs=None,
):  # fmt: skip
    (*betas, eps), skip = betas_and_eps, as_float(found_inf)
    with device_guard(params[0]):
        table = Table("lamb_apply", steps, PARAM=params, M=exp_avgs, V=exp_avg_sqs)
        decays, rates = table.numbers(weight_decays, dtype=torch.float64), table.rates(lrs, device_lrs)
        seeds, keys = table.rounding(seeds, first_elements)
        factors = table.room(len(params), 4)
        arguments = decays, rates, seeds, norms.contiguous(), None, skip, factors, keys, *logs(*betas)
        table.prepare(prepare_kernel, *arguments, LISTS=4, NVLAMB=nvlamb)
        table.launch(apply_kernel, factors, keys, skip, eps, NVLAMB=nvlamb)
        table.return_copies("PARAM")


# --- calls that are timed and compiled for each entry of CONFIGS ------------------------------------------------------


def lamb_update_calls(draw):
    tensors, numbers, flags, _ = draw_tensors(draw)
    yield *tensors, numbers, BETAS_AND_EPS, True, *flags
    yield *tensors, numbers, BETAS_AND_EPS, False, None, None


def lamb_apply_calls(draw):
    (params, _, *state), numbers, (_, found_inf), rounding = draw_tensors(draw)
    arguments = params, *state, draw.statistic(len(params), 2), numbers, numbers, BETAS_AND_EPS
    yield *arguments, True, found_inf, *rounding
    yield *arguments, False, None, [], []
