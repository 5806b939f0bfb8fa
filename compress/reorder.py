"""Channels in another order, so that neighbours matter alike; the model computes what it did.

A format that prunes or scales groups of neighbouring inputs does better by groups whose members it would treat alike:
what it drops is then small throughout. Three axes of a decoder may be permuted at no cost in inference, because every
weight along them is: the residual stream (columns of embedding and head, norms, what reads it and what writes it), the
inside of each gated FFN (outputs of gate and up, inputs of down), and the values of each attention head. Channel
permutations for N:M patterns are due to Pool and Yu (2021, NeurIPS); folded into the neighbouring layers, as in RIA
(Zhang et al. 2024, ICLR), they leave nothing to do at run time.

Inputs are sorted by the sums of their squared weights times their mean square, what all outputs together lose without
them (Wanda's score, Sun et al. 2023, arXiv 2306.11695). Where tensor parallelism may cut a linear's inputs, and every
piece must keep as many groups, the sorted groups are dealt to the pieces in turn.

Names of hidden dimensions change with it: LoRA adapters and probes of the dense model do not fit the result.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..serving.checkpoint import read_header
from ..serving.errors import InputError, RunError
from .blocks import BlockWalker
from .journal import Journal
from .passes import StageConfig
from .recipe import Reorder
from .statistics import InputStatistics
from .writer import read_part

TOKENS = 8192  # of the calibration, at most
PIECES = 8  # that tensor parallelism may cut a linear's inputs into, as far as groups can be dealt evenly

Say = Callable[[str], None]

_ORDERS = "orders.safetensors"
_CHECKED = "reordered"  # a note in the journal
_LOSS = 0.05  # nats that rounding may change; channels that do not belong together cost several

# Axes of what blocks hold: of the weight's dimensions; a bias has the first. `queries` are the values' by query head.
_AXES: dict[str, tuple[str | None, ...]] = {
    r"self_attn\.[qk]_proj": (None, "residual"),
    r"self_attn\.v_proj": ("values", "residual"),
    r"self_attn\.o_proj": ("residual", "queries"),
    r"self_attn\.[qk]_norm": (None,),
    r"mlp\.(gate|up)_proj": ("ffn", "residual"),
    r"mlp\.down_proj": ("residual", "ffn"),
    r"(input|(pre|post)_(attention|feedforward))_layernorm": ("residual",),
}


def reorder(
    walker: BlockWalker,
    settings: Reorder,
    stages: Mapping[str, StageConfig],
    windows: Sequence[Tensor],
    journal: Journal,
    say: Say,
) -> None:
    """Make `walker` read its checkpoint with the channels in another order, from parts of the journal.

    Inputs of the linears in `stages` count. `windows` `[T]` are the calibration's, of which the first are used; `say`
    is told about every step. One block is held at a time, or the embedding. Raises InputError where the model has
    tensors whose axes are not known, and RunError should it not compute what it did.
    """
    leads, few = journal.world.leads, list(windows[: max(1, TOKENS // len(windows[0]))])
    axes = tensor_axes(walker)
    if journal.done(_ORDERS) is None:
        orders, loss = channel_orders(walker, settings, stages, axes, few, say) if leads else ({}, 0.0)
        journal.store(_ORDERS, orders, loss=loss)
    orders = read_part(journal.folder / _ORDERS)
    found = {}
    for part, names in _parts(walker, axes).items():
        if journal.done(part) is None:
            say(f"writing {part}")
            journal.store(part, {walker.names[n]: _permuted(walker, n, axes[n], orders) for n in names if leads})
        found.update(read_header(journal.folder / part))
    walker.checkpoint = walker.checkpoint.with_tensors(found)
    if not journal.notes(_CHECKED):
        say("checking")
        before = (journal.done(_ORDERS) or {})["loss"]
        after = _first_loss(walker, few) if leads else before
        if abs(after - before) > _LOSS:
            raise RunError(
                f"{walker.checkpoint.path}: the model computes something else when its channels are reordered (loss"
                f" {before:.3f} -> {after:.3f} on calibration text); remove `reorder` from the recipe"
            )
        journal.note(_CHECKED, {"loss": after})


def steps(walker: BlockWalker) -> int:
    """How often `reorder` says something."""
    return walker.n_blocks + len(_parts(walker, tensor_axes(walker))) + 1


def tensor_axes(walker: BlockWalker) -> dict[str, tuple[str | None, ...]]:
    """The axis along each dimension of the model's stored tensors, by state-dict name: `residual`, or a block's own
    such as `model.layers.3.ffn`, or None. Raises InputError for a tensor that is not known."""
    outer = walker.prefix.rpartition(".")[0]
    known: dict[str, tuple[str | None, ...]] = {
        walker.embedding: (None, "residual"),
        walker.head: (None, "residual"),
        f"{outer}.norm": ("residual",),
    }
    found = {}
    for name, info in walker.stored().items():
        module, _, kind = name.rpartition(".")
        dims = known.get(module)
        if name.startswith(f"{walker.prefix}."):
            number, _, inside = module.removeprefix(f"{walker.prefix}.").partition(".")
            dims = next((dims for pattern, dims in _AXES.items() if re.fullmatch(pattern, inside)), None)
            if dims is not None:
                block = f"{walker.prefix}.{number}"
                dims = tuple(f"{block}.{axis}" if axis not in (None, "residual") else axis for axis in dims)
        if dims is None or kind not in ("weight", "bias") or len(info.shape) != (1 if kind == "bias" else len(dims)):
            raise InputError(
                f"{walker.checkpoint.path}: reorder does not know what {name} does to the channels; remove `reorder`"
                " from the recipe"
            )
        found[name] = dims[: len(info.shape)]
    return found


def channel_orders(
    walker: BlockWalker,
    settings: Reorder,
    stages: Mapping[str, StageConfig],
    axes: Mapping[str, tuple[str | None, ...]],
    windows: list[Tensor],
    say: Say,
) -> tuple[dict[str, Tensor], float]:
    """For each axis the old place of every channel, int32, and the model's loss on the first of `windows` (nats)."""
    scores: dict[str, Tensor] = {}
    stream = walker.embed(windows)
    for index in range(walker.n_blocks):
        say(walker.block_prefix(index))
        with walker.block(index) as block:
            linears = {name: linear for name, linear in walker.block_linears(index).items() if name in stages}
            statistics = {n: InputStatistics(m.in_features, False, walker.device) for n, m in linears.items()}
            handles = [m.register_forward_pre_hook(_adder(statistics[name])) for name, m in linears.items()]
            for x in stream:
                x.copy_(walker.run(index, block, x))
            for handle in handles:
                handle.remove()
            for name, linear in linears.items():
                axis = axes[f"{name}.weight"][1]
                statistics[name].require_usable(name)
                score = linear.weight.float().square().sum(0) * statistics[name].mean_square
                if axis is not None:  # readers of one axis count alike
                    scores[axis] = scores.get(axis, 0.0) + (score / score.mean()).clamp_min(1e-30).log()
    text = walker.model.config.get_text_config()
    orders = {}
    for axis, score in scores.items():
        kind = axis.rpartition(".")[2]
        if kind == "queries" and "values" in settings.axes:
            heads = score.exp().view(text.num_key_value_heads, -1, len(score) // text.num_attention_heads)
            order = heads.sum(1).argsort(dim=1, descending=True, stable=True)
            orders[axis.replace("queries", "values")] = _by_head(order[:, None])
            orders[axis] = _by_head(order[:, None].expand_as(heads))
        elif kind in settings.axes:
            order = score.argsort(descending=True, stable=True)
            orders[axis] = deal(order, settings.group_size) if kind == "ffn" else order
    loss = walker.losses([stream[0][:1]], windows[:1])[0].mean()
    return {axis: order.int() for axis, order in orders.items()}, float(loss)


def deal(order: Tensor, group_size: int) -> Tensor:
    """The channels `order` `[K]` in groups of neighbours, dealt in turn, and back, to the pieces one after the other
    that a linear's inputs may be cut into."""
    count = -(-len(order) // group_size)
    pieces = next(p for p in (PIECES, 4, 2, 1) if len(order) % (group_size * p) == 0 or p == 1)
    if pieces == 1:
        return order
    rounds = order.view(count // pieces, pieces, group_size).clone()
    rounds[1::2] = rounds[1::2].flip(1)
    return rounds.transpose(0, 1).reshape(-1)


def _by_head(order: Tensor) -> Tensor:
    """Places inside of heads `[..., D]` -> places among all channels."""
    flat = order.reshape(-1, order.shape[-1])
    return (flat + flat.shape[1] * torch.arange(len(flat), device=flat.device)[:, None]).flatten()


def _adder(statistics: InputStatistics) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    return lambda module, args: statistics.add(args[0])


def _parts(walker: BlockWalker, axes: Mapping[str, tuple[str | None, ...]]) -> dict[str, list[str]]:
    """File names, and the tensors (by state-dict name) in each: a block's, or one of the others."""
    parts: dict[str, list[str]] = {}
    for name in axes:
        inside = name.removeprefix(f"{walker.prefix}.")
        label = name.rpartition(".")[0] if inside == name else f"{walker.prefix}.{inside.partition('.')[0]}"
        parts.setdefault(f"reordered-{label}.safetensors", []).append(name)
    return parts


def _permuted(walker: BlockWalker, name: str, axes: tuple[str | None, ...], orders: Mapping[str, Tensor]) -> Tensor:
    """Tensor `name` of the checkpoint, in its own dtype, with its channels in order."""
    tensor = walker.checkpoint.read(walker.names[name])
    for dim, axis in enumerate(axes):
        if axis is not None and axis in orders:
            tensor = tensor.index_select(dim, orders[axis].long())
    return tensor


def _first_loss(walker: BlockWalker, windows: list[Tensor]) -> float:
    """The model's loss on the first of `windows`, nats."""
    (x,) = walker.embed(windows[:1])
    for index in range(walker.n_blocks):
        with walker.block(index) as block:
            x = walker.run(index, block, x)
    return float(walker.losses([x], windows[:1])[0].mean())
