"""How much each input of a linear moves the output of its block: a score for input selection, from gradients.

Input j of a linear adds x_j w_j to its output z. Not to read it changes the block's output y by about
(dy/dz) w_j x_j, so that |x_j| times the root mean square of (dy/dz) w_j ranks inputs by what their absence does to the
block, as |x_j| * ||w_j|| does by what it does to the linear. Gradient sparse autoencoders (arXiv 2411.10397) weigh
their features so, by the gradient of the model's loss.

The objective here is local, the squared relative error of the block's output: a model that is streamed block by block
has no gradient of its loss at hand. At the dense block that error has no slope, so it is the curvature that counts, the
diagonal of J^T J (Gauss-Newton), which products of random signs with J estimate without bias (Hutchinson's estimator).
Through a residual stream the last linear's J is the identity, and its score that of `l2`, up to the estimate's noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

GRADIENT_BATCHES = 4  # of the calibration, of about 1024 tokens each


def input_sensitivities(
    run: Callable[[Tensor], Tensor], linears: Mapping[str, nn.Linear], inputs: Sequence[Tensor], seed: int
) -> dict[str, Tensor]:
    """For each of a block's `linears` `[N, K]`, fp32 `[K]`: the root of the mean over tokens of `||(dy/dz) w_j||^2`,
    with z the linear's output for the token, and y the block's outputs for all, each divided by its norm.

    `run` is the block's forward pass, for its `inputs` `[B, T, D]`, and must record gradients. One of the inputs is run
    at a time, with one vector of signs, drawn from `seed`; only what its backward pass needs is held.
    """
    sums = {name: torch.zeros(linear.in_features, device=linear.weight.device) for name, linear in linears.items()}
    generator = torch.Generator().manual_seed(seed)
    scale = 1.0  # keeps gradients of 16 bits in range

    def watch(name: str, linear: nn.Linear) -> Callable[[nn.Module, object, Tensor], None]:
        def add(gradient: Tensor) -> None:
            rows = gradient.reshape(-1, gradient.shape[-1]).to(linear.weight.dtype)
            sums[name] += (rows @ linear.weight.detach()).float().div(scale).square().sum(0)

        def see(module: nn.Module, args: object, output: Tensor) -> None:
            output.register_hook(add)

        return see

    handles = [linear.register_forward_hook(watch(name, linear)) for name, linear in linears.items()]
    tokens = 0
    try:
        for x in inputs:
            with torch.enable_grad():
                start = x.detach().clone().requires_grad_()
                y = run(start)
            signs = torch.randint(2, y.shape, generator=generator).to(y.device) * 2.0 - 1.0
            size = y.detach().float().norm(dim=-1, keepdim=True)
            scale = float(size.mean()) or 1.0
            torch.autograd.grad(y, start, torch.where(size > 0, scale * signs / size, 0.0).to(y.dtype))
            tokens += y[..., 0].numel()
    finally:
        for handle in handles:
            handle.remove()
    return {name: (total / max(tokens, 1)).sqrt() for name, total in sums.items()}
