"""Changes of basis that leave what the model computes as it is, and make it easier to compress.

They are folded into the weights, and cost nothing at run time. The residual stream and the inside of each gated FFN
allow permutations, because every weight along them is permuted alike: embedding and head, norms, what reads and what
writes. A format that prunes or scales groups of neighbouring inputs does better by groups whose members it would treat
alike, so channels are sorted. Permutations for N:M patterns are due to Pool and Yu (2021, NeurIPS), folded into the
neighbours as in RIA (Zhang et al. 2024, ICLR). Inputs rank by the sums of their squared weights times their mean
square, what all outputs lose without them (Wanda's score, Sun et al. 2023, arXiv 2306.11695). Where tensor parallelism
may cut a linear's inputs, and every piece must keep as many groups, the sorted groups are dealt to the pieces in turn.

The values of an attention head allow any rotation: attention is linear in them, so what turns the outputs of the value
projection is turned back in the output projection. They are turned into their principal components, as SliceGPT
(Ashkboos et al. 2024, arXiv 2401.15024) and La RoSA (Liu et al. 2025, arXiv 2507.01299) do with the residual stream:
few inputs of the output projection then carry most, and a token that reads the largest, or a weight without the rest,
loses less.

Hidden dimensions mean something else afterwards: LoRA adapters and probes of the dense model do not fit the result.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..serving.checkpoint import read_header
from ..serving.errors import InputError, RunError
from .blocks import BlockWalker
from .calibration import first_windows
from .journal import Journal
from .passes import StageConfig
from .recipe import Basis
from .statistics import InputStatistics
from .writer import read_part

TOKENS = 8192  # of the calibration, at most
PIECES = 8  # that tensor parallelism may cut a linear's inputs into, as far as groups can be dealt evenly

Say = Callable[[str], None]

_CHANGES = "basis.safetensors"
_CHECKED = "basis"  # a note in the journal
_LOSS = 0.05  # nats that rounding may change; channels that do not belong together cost several

# Axes of what blocks hold: of the weight's dimensions; a bias has the first.
_AXES: dict[str, tuple[str | None, ...]] = {
    r"self_attn\.[qk]_proj": (None, "residual"),
    r"self_attn\.v_proj": ("values", "residual"),
    r"self_attn\.o_proj": ("residual", "values"),
    r"self_attn\.[qk]_norm": (None,),
    r"mlp\.(gate|up)_proj": ("ffn", "residual"),
    r"mlp\.down_proj": ("residual", "ffn"),
    r"(input|(pre|post)_(attention|feedforward))_layernorm": ("residual",),
}


def change_basis(
    walker: BlockWalker,
    settings: Basis,
    stages: Mapping[str, StageConfig],
    windows: Sequence[Tensor],
    journal: Journal,
    say: Say,
) -> None:
    """Make `walker` read its checkpoint in another basis, from parts of the journal.

    Inputs of the linears in `stages` count. `windows` `[T]` are the calibration's, of which the first are used; `say`
    is told about every step. One block is held at a time, or the embedding. Raises InputError where the model has
    tensors whose axes are not known, and RunError should it not compute what it did.
    """
    leads, few = journal.world.leads, first_windows(windows, TOKENS)
    axes = tensor_axes(walker)
    if journal.done(_CHANGES) is None:
        changes, loss = find_changes(walker, settings, stages, axes, few, say) if leads else ({}, 0.0)
        journal.store(_CHANGES, changes, loss=loss)
    changes = read_part(journal.folder / _CHANGES)
    found = {}
    for part, names in parts(walker, settings, axes).items():
        if journal.done(part) is None:
            say(f"writing {part}")
            journal.store(part, {walker.names[n]: _changed(walker, n, axes[n], changes) for n in names if leads})
        found.update(read_header(journal.folder / part))
    walker.checkpoint = walker.checkpoint.with_tensors(found)
    if not journal.notes(_CHECKED):
        say("checking")
        before = (journal.done(_CHANGES) or {})["loss"]
        after = _first_loss(walker, few) if leads else before
        if abs(after - before) > _LOSS:
            raise RunError(
                f"{walker.checkpoint.path}: the model computes something else in another basis (loss {before:.3f} ->"
                f" {after:.3f} on calibration text); remove `basis` from the recipe"
            )
        journal.note(_CHECKED, {"loss": after})


def steps(walker: BlockWalker, settings: Basis) -> int:
    """How often `change_basis` says something."""
    return walker.n_blocks + len(parts(walker, settings, tensor_axes(walker))) + 1


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
                f"{walker.checkpoint.path}: basis: what {name} does to the channels is not known; remove `basis`"
                " from the recipe"
            )
        found[name] = dims[: len(info.shape)]
    return found


def find_changes(
    walker: BlockWalker,
    settings: Basis,
    stages: Mapping[str, StageConfig],
    axes: Mapping[str, tuple[str | None, ...]],
    windows: list[Tensor],
    say: Say,
) -> tuple[dict[str, Tensor], float]:
    """For each axis (of `axes`, as `tensor_axes` gives them) the old place of every channel, int32, or the rotation of
    every head of values, fp32 `[heads, D, D]`; and the model's loss on the first of `windows`, in nats."""
    heads: int = walker.model.config.get_text_config().num_key_value_heads
    scores: dict[str, Tensor] = {}
    changes: dict[str, Tensor] = {}
    stream = walker.embed(windows)
    for index in range(walker.n_blocks):
        say(walker.block_prefix(index))
        with walker.block(index) as block:
            linears = {name: linear for name, linear in walker.block_linears(index).items() if name in stages}
            read = {name: str(axes[f"{name}.weight"][1]) for name in linears}
            statistics = {
                name: InputStatistics(linear.in_features, _kind(read[name]) == "values", walker.device)
                for name, linear in linears.items()
                if _kind(read[name]) in settings.axes
            }
            with ExitStack() as hooks:
                for name, found in statistics.items():
                    hooks.callback(linears[name].register_forward_pre_hook(_adder(found)).remove)
                for x in stream:
                    x.copy_(walker.run(index, block, x))
            for name, found in statistics.items():
                found.require_usable(name)
                if _kind(read[name]) == "values":
                    changes[read[name]] = principal_components(found.hessian, heads, _head_size(walker, index))
                else:  # readers of one axis count alike
                    score = linears[name].weight.float().square().sum(0) * found.mean_square
                    score = (score / score.mean()).clamp_min(torch.finfo(torch.float32).tiny).log()
                    scores[read[name]] = scores[read[name]] + score if read[name] in scores else score
    for axis, score in scores.items():
        order = score.argsort(descending=True, stable=True)
        changes[axis] = (deal(order, settings.group_size) if _kind(axis) == "ffn" else order).int()
    return changes, float(walker.losses([stream[0][:1]], windows[:1])[0].mean())


def principal_components(moments: Tensor, heads: int, size: int) -> Tensor:
    """Orthogonal `[heads, size, size]`, fp32: columns are the principal components of what every head of values gives,
    the largest first, from the second `moments` `[K, K]` of attention's outputs; K holds `heads` x queries x `size`."""
    blocks = moments.unflatten(0, (heads, -1, size)).unflatten(-1, (heads, -1, size))
    own = torch.einsum("hqdhqe->hde", blocks)
    return torch.linalg.eigh(own.double()).eigenvectors.flip(-1).float().contiguous()


def _head_size(walker: BlockWalker, index: int) -> int:
    """Values per head of block `index`."""
    config = walker.model.config.get_text_config()
    name = f"{walker.block_prefix(index)}.self_attn.v_proj"
    size: int = walker.linear_shapes()[name][0] // config.num_key_value_heads
    return size


def _kind(axis: str) -> str:
    """What an axis is of."""
    return axis.rpartition(".")[2]


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


def _adder(statistics: InputStatistics) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    return lambda module, args: statistics.add(args[0])


def parts(walker: BlockWalker, settings: Basis, axes: Mapping[str, tuple[str | None, ...]]) -> dict[str, list[str]]:
    """File names, and the tensors that may change (by state-dict name) in each: a block's, or one of the others."""
    parts: dict[str, list[str]] = {}
    for name, dims in axes.items():
        if not any(axis is not None and _kind(axis) in settings.axes for axis in dims):
            continue
        inside = name.removeprefix(f"{walker.prefix}.")
        label = name.rpartition(".")[0] if inside == name else f"{walker.prefix}.{inside.partition('.')[0]}"
        parts.setdefault(f"basis-{label}.safetensors", []).append(name)
    return parts


def _changed(walker: BlockWalker, name: str, axes: tuple[str | None, ...], changes: Mapping[str, Tensor]) -> Tensor:
    """Tensor `name` of the checkpoint, in its own dtype, in the other basis."""
    tensor = walker.checkpoint.read(walker.names[name])
    for dim, axis in enumerate(axes):
        change = None if axis is None else changes.get(axis)
        if change is not None:
            tensor = tensor.index_select(dim, change.long()) if change.ndim == 1 else rotated(tensor, dim, change)
    return tensor


def rotated(tensor: Tensor, dim: int, rotations: Tensor) -> Tensor:
    """`tensor` with the heads along `dim`, as many queries for each of the `rotations` `[heads, D, D]`, turned."""
    heads, size, _ = rotations.shape
    parts = tensor.movedim(dim, -1).to(rotations.dtype).unflatten(-1, (heads, -1, size))
    turned = torch.einsum("...hqd,hde->...hqe", parts, rotations).flatten(-3)
    return turned.movedim(-1, dim).to(tensor.dtype).contiguous()


def _first_loss(walker: BlockWalker, windows: list[Tensor]) -> float:
    """The model's loss on the first of `windows`, nats."""
    (x,) = walker.embed(windows[:1])
    for index in range(walker.n_blocks):
        with walker.block(index) as block:
            x = walker.run(index, block, x)
    return float(walker.losses([x], windows[:1])[0].mean())
