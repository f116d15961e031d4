"""AdamW: one launch over all tensors, after a launch that increments steps and computes factors of whole tensors.

A program updates a chunk of one tensor. Traffic: 28 bytes for each float32 element.
"""

import torch
import triton
import triton.language as tl

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

CONFIGS = {80: {"adamw_update": [entry(CHUNK=8192, BLOCK=1024, num_warps=4)]}}
"""Launch configurations by compute capability; a GPU has those of the highest up to its own."""


@triton.jit(do_not_specialize=["count"])
def prepare_kernel(
    pointers,
    lrs,
    decays,
    seeds,
    grad_scale,
    found_inf,
    factors,
    keys,
    log_beta1: tl.float64,
    log_beta2: tl.float64,
    count,
    BLOCK: tl.constexpr,
):
    tensor, inside, step, bias1, bias2 = lanes_at(pointers, count, found_inf, (log_beta1, log_beta2), 5, True, BLOCK)
    lr = tl.load(lrs + tensor, mask=inside, other=0.0)
    weight_decay = tl.load(decays + tensor, mask=inside, other=0.0)
    decay_factor = 1.0 - lr * weight_decay
    store_floats(factors, 4 * tensor, decay_factor, inside)
    store_floats(factors, 4 * tensor + 1, lr / bias1, inside)
    store_floats(factors, 4 * tensor + 2, 1.0 / tl.sqrt(bias2), inside)
    store_gradient_factor(factors + 4 * tensor + 3, grad_scale, inside)
    if keys is not None:
        store_keys(keys, seeds, tensor, step, inside)


@triton.jit(do_not_specialize=["first"])
def update_kernel(
    pointers,
    chunks,
    first,
    factors,
    keys,
    found_inf,
    beta1: tl.float64,
    beta2: tl.float64,
    eps: tl.float32,
    PARAM: tl.constexpr,
    M: tl.constexpr,
    V: tl.constexpr,
    GRAD: tl.constexpr,
    FITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if is_set(found_inf):
        return
    tensor, begin, end = chunk_at(chunks, first + tl.program_id(0), FITS)
    param, exp_avg, exp_avg_sq, grad = buffers_at(pointers + 5 * tensor + 1, (PARAM, M, V, GRAD), FITS)
    decay_factor = tl.load(factors + 4 * tensor)
    rate = tl.load(factors + 4 * tensor + 1)
    v_factor = tl.load(factors + 4 * tensor + 2)
    grad_factor = tl.load(factors + 4 * tensor + 3)
    for start in range(begin, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < end
        g = load_floats(grad, i, inside) * grad_factor
        m, v = load_floats(exp_avg, i, inside), load_floats(exp_avg_sq, i, inside)
        m, v = updated_moments(g, m, v, beta1, beta2)
        w = decay_factor * load_floats(param, i, inside) - rate * tl.div_rn(m, tl.sqrt_rn(v) * v_factor + eps)
        store_floats(param, i, rounded(w, i, keys, tensor), inside)
        store_floats(exp_avg, i, m, inside)
        store_floats(exp_avg_sq, i, v, inside)


def adamw_update(
    params, grads, exp_avgs, exp_avg_sqs, steps, lrs, weight_decays, betas_and_eps, grad_scale, found_inf, seeds,
    first_elements, device_lrs=None,
):  # fmt: skip
    (*betas, eps), skip = betas_and_eps, as_float(found_inf)
    with device_guard(params[0]):
        table = Table("adamw_update", steps, PARAM=params, M=exp_avgs, V=exp_avg_sqs, GRAD=grads)
        lrs, decays = table.rates(lrs, device_lrs), table.numbers(weight_decays, dtype=torch.float64)
        factors, (seeds, keys) = table.room(len(params), 4), table.rounding(seeds, first_elements)
        table.prepare(prepare_kernel, lrs, decays, seeds, as_float(grad_scale), skip, factors, keys, *logs(*betas))
        table.launch(update_kernel, factors, keys, skip, *betas, eps)
        table.return_copies("PARAM", "M", "V")


# --- calls that are timed and compiled for each entry of CONFIGS ------------------------------------------------------


def adamw_update_calls(draw):
    tensors, numbers, flags, rounding = draw_tensors(draw)
    rates = numbers, numbers
    yield *tensors, *rates, BETAS_AND_EPS, *flags, *rounding
    yield *tensors, *rates, BETAS_AND_EPS, None, None, [], []
