"""Walks a decoder block by block without ever holding the whole model.

The model is built on the meta device, so it has structure and no weights. One skeleton forward pass, with every block
replaced by the identity, yields the embedded inputs and the exact keyword arguments (masks, rotary tables, positions)
that the model would give to each block; after that a block can be materialized alone, run, and dropped. No model's
forward pass is reimplemented here, which is why any decoder whose blocks are a module list works.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from ..eval.perplexity import decoder_returns
from ..serving.checkpoint import Checkpoint, TensorInfo
from ..serving.embedding import CompressedEmbedding, TiedHead
from ..serving.errors import InputError
from ..serving.experts import Experts
from ..serving.linear import CompressedWeight, check_weights
from ..serving.load import resolve_dtype
from ..serving.skeleton import build_skeleton, context_length, find_blocks, is_linear, tensor_names, tied_names
from ..serving.tables import Table
from .attention import attend_in_bands

_LOGITS = 2**21  # logits that exist at once: 8 MB of fp32, where all of a 262k vocabulary's are 1 GB per 1024 tokens


def batch_size(length: int) -> int:
    """Windows of `length` tokens to run at once: 1024 tokens fill the matmuls and keep their activations small."""
    return max(1, 1024 // length)


def compute_dtype(dtype: str, device: torch.device, stored: torch.dtype) -> torch.dtype:
    """What blocks compute in while they are compressed: `resolve_dtype`, but `auto` also picks bf16 on fast CPUs.

    Those are CPUs that multiply bf16 with fp32 sums; weights stored as bf16 lose nothing, and rounding an activation by
    2^-9 changes its second moments far less than the choice of calibration text does.
    """
    if dtype == "auto" and device.type == "cpu" and stored == torch.bfloat16:
        capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older torch cannot tell
        if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"):
            return torch.bfloat16
    return resolve_dtype(dtype, device, stored)


def open_dense(path: Path) -> Checkpoint:
    """The checkpoint at `path`; raises InputError when it is compressed already."""
    checkpoint = Checkpoint(path)
    if checkpoint.artifact is not None:
        raise InputError(f"{path}: is compressed by halfweight already; start from the dense checkpoint")
    return checkpoint


class BlockWalker:
    """Streams a checkpoint, dense or compressed, through its decoder blocks.

    Attributes: `model` (the skeleton), `prefix` (name of the block list, such as `model.layers`), `n_blocks`,
    `max_length` (the model's context in tokens, or None), `names` (state-dict name -> that in the checkpoint).
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        """Builds the skeleton from the config; reads no weights. `dtype` is what blocks compute in.

        Raises InputError when the model is not causal, has no block list, or lacks tensors in the checkpoint.
        """
        self.checkpoint, self.device, self.dtype = checkpoint, device, dtype
        self.model = build_skeleton(checkpoint, dtype)
        if device.type == "cpu":
            attend_in_bands(self.model)
        _computed_buffers_to(self.model, device)
        self.prefix, self.blocks = find_blocks(self.model)
        for module in self.model.modules():
            if isinstance(module, Experts):
                module.call_all = checkpoint.artifact is None  # for the statistics; kernels may not take no tokens
        self.n_blocks = len(self.blocks)
        self.embedding, self.head = _vocabulary_modules(self.model)
        self.names = tensor_names(self.model, checkpoint.tensors)
        self.max_length = context_length(self.model.config)
        # Arguments of each block by input shape [B, T], and what each block returns besides the hidden states.
        self._calls: dict[tuple[int, ...], list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
        self._extras: dict[int, tuple[Any, ...] | None] = {}

    # --- names -------------------------------------------------------------------------------------------------

    def block_prefix(self, index: int) -> str:
        """Dotted name of block `index`, such as `model.layers.3`."""
        return f"{self.prefix}.{index}"

    def block_linears(self, index: int) -> dict[str, nn.Linear]:
        """The (possibly weightless) linears of block `index` by full name, in forward order of definition."""
        prefix = self.block_prefix(index)
        return {f"{prefix}.{n}": m for n, m in self.blocks[index].named_modules() if isinstance(m, nn.Linear)}

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """`(N, K)` of every linear in the blocks, by full name."""
        names = [self.block_linears(index) for index in range(self.n_blocks)]
        return {n: (m.out_features, m.in_features) for linears in names for n, m in linears.items()}

    def stored(self) -> dict[str, TensorInfo]:
        """State-dict name -> header entry of every tensor the checkpoint holds for the model, tied copies left out."""
        tied = tied_names(self.model)
        return {name: self.checkpoint.info(stored) for name, stored in self.names.items() if name not in tied}

    def tables(self) -> dict[str, Table]:
        """The embedding and, unless it is tied to that, the head, by name."""
        return {name: self._table(name) for name in dict.fromkeys((self.embedding, self.head_table))}

    @property
    def head_table(self) -> str:
        """Name of the module whose table the head's weights are."""
        tied = isinstance(self.model.get_submodule(self.head), TiedHead)
        return self.embedding if tied or f"{self.head}.weight" in tied_names(self.model) else self.head

    def _table(self, name: str) -> Table:
        module, stored = self.model.get_submodule(name), self.stored()
        compressed = isinstance(module, CompressedWeight)
        suffixes = [suffix for suffix in module.state_dict(keep_vars=True) if suffix != "bias"]
        tensors = {suffix: stored[f"{name}.{suffix}"] for suffix in suffixes}
        shape = module.shape if compressed else tuple(module.weight.shape)
        return Table(name, shape, tensors, module.scheme if compressed else None)

    # --- weights -----------------------------------------------------------------------------------------------

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Block `index` with its weights in `dtype` on `device`; they are dropped again at the end of the `with`."""
        block = self.blocks[index]
        self._materialize(block, self.block_prefix(index))
        check_weights(block, f"{self.checkpoint.path}: {self.block_prefix(index)}")
        try:
            yield block
        finally:
            _to_meta(block)

    def _materialize(self, module: nn.Module, prefix: str, skip: tuple[str, ...] = ()) -> None:
        names = self.names
        state = {}
        for key in module.state_dict(keep_vars=True):
            full = f"{prefix}.{key}" if prefix else key
            if full.startswith(skip):
                continue
            if full not in names:
                continue  # tied to one that is read; build_skeleton has checked that nothing else is missing
            info = self.checkpoint.info(names[full])
            wanted = self.dtype if info.dtype.is_floating_point else None
            state[key] = self.checkpoint.read(names[full], wanted, self.device)
        module.load_state_dict(state, assign=True, strict=False)
        module.requires_grad_(False)

    @contextmanager
    def _outside(self, table: Table | None = None) -> Iterator[None]:
        """Everything but the blocks and the head with its weights, for the length of the `with`.

        The embedding, often the largest tensor of all, reads the rows that are looked up and no others; from `table`,
        when that is to stand in for the checkpoint's own.
        """
        table, embedding = table or self._table(self.embedding), self.model.get_submodule(self.embedding)

        def look_up(ids: Tensor) -> Any:
            rows, places = ids.unique(return_inverse=True)
            found = table.gather(rows.tolist(), self.dtype, self.device)
            if isinstance(embedding, CompressedEmbedding):
                return embedding.scaled(found)[places]
            own = embedding.weight, embedding.padding_idx
            embedding.weight, embedding.padding_idx = nn.Parameter(found, requires_grad=False), None
            try:
                return type(embedding).forward(embedding, places)  # padding only matters to gradients
            finally:
                embedding.weight, embedding.padding_idx = own

        self._materialize(self.model, "", skip=(self.prefix + ".", self.embedding + ".", self.head + "."))
        embedding.forward = look_up
        try:
            yield
        finally:
            del embedding.forward
            for name, child in self.model.named_modules():
                if not (name + ".").startswith(self.prefix + "."):
                    _to_meta(child, recurse=False)

    @contextmanager
    def vocabulary(self, table: Table | None = None) -> Iterator[None]:
        """What `decoded` and `logits` need, with its weights, for the length of the `with`; the head's from `table`,
        when that is to stand in for the checkpoint's own."""
        size = self.model.get_submodule(self.head).out_features
        with self._outside(), self._head_rows(slice(0, size), table):
            yield

    @contextmanager
    def _head_rows(self, rows: slice, table: Table | None = None) -> Iterator[None]:
        """The head with weights for the vocabulary's `rows` alone, for the length of the `with`."""
        head = self.model.get_submodule(self.head)
        weight, bias = (table or self._table(self.head_table)).read(rows, self.dtype, self.device), None
        if head.bias is not None:
            bias = self.checkpoint.read(self.names[f"{self.head}.bias"], self.dtype, self.device, rows)
        head.forward = lambda x: nn.functional.linear(x, weight, bias)
        try:
            yield
        finally:
            del head.forward

    # --- running -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def embed(self, windows: list[Tensor], table: Table | None = None) -> list[Tensor]:
        """Inputs `[B, T, D]` of block 0, in batches of token windows `[T]`; learns every block's arguments on the way.

        All windows, if there are any, have one length; B is what `batch_size` says, less in the last batch. The batches
        are views of one tensor, to be updated in place: thousands of separate activations would riddle the heap with
        holes. Embeddings come from `table` when that is to stand in for the checkpoint's own.
        """
        if not windows:
            return []
        stream = torch.empty(0)
        filled = 0
        for x in self.embedded(windows, table):
            if filled == 0:
                stream = x.new_empty((len(windows), *x.shape[1:]))
            stream[filled : filled + len(x)] = x
            filled += len(x)
        return list(stream.split(batch_size(len(windows[0]))))

    @torch.no_grad()
    def embedded(self, windows: list[Tensor], table: Table | None = None) -> Iterator[Tensor]:
        """As `embed`, one batch after the other."""
        if not windows:
            return
        first = torch.empty(0)

        def record(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            nonlocal first
            x, args, kwargs = _split_hidden(args, kwargs)
            calls = self._calls.setdefault(tuple(x.shape[:2]), [])
            if len(calls) == index:
                calls.append((args, kwargs))
            if index == 0:
                first = x
            return x

        with self._outside(table), self._replaced_blocks(record):
            for batch in torch.stack(windows).split(batch_size(len(windows[0]))):
                self.model.get_decoder()(input_ids=batch.to(self.device), use_cache=False)
                yield first

    @torch.no_grad()
    def run(self, index: int, block: nn.Module, x: Tensor) -> Tensor:
        """Output `[B, T, D]` of block `index` for `x` `[B, T, D]`, with the arguments the model itself would pass."""
        return self.call(index, block, x, {})

    def call(self, index: int, block: nn.Module, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """As `run`, with gradients, and with `weights` (name inside the block -> tensor) instead of the block's own."""
        args, kwargs = self._calls[tuple(x.shape[:2])][index]
        out = functional_call(block, dict(weights), (x, *args), kwargs) if weights else block(x, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def learn(self, batch: int, length: int) -> None:
        """Make `call` work for inputs `[batch, length, D]`; `embed` does it for the shapes it returns."""
        if (batch, length) not in self._calls:
            self.embed([torch.zeros(length, dtype=torch.long)] * batch)

    @torch.no_grad()
    def losses(self, hidden: Iterable[Tensor], windows: list[Tensor], logits: int = _LOGITS) -> list[Tensor]:
        """Next-token cross entropy `[T - 1]` (nats, fp32) per window, from the last block's outputs `hidden`.

        The final norm, the head and any scaling of logits run in the model's own code, a slice of the vocabulary at a
        time, so that neither the head's weights nor more than `logits` logits of a window are ever held.
        """
        if not windows:
            return []
        size = self.model.get_submodule(self.head).out_features
        step = max(1, logits // len(windows[0]))
        targets = torch.stack(windows).to(self.device)[:, 1:]
        with self._outside():
            rows = (row[None] for x in hidden for row in x)
            outputs = [self.decoded(x, window) for x, window in zip(rows, windows, strict=True)]
        total = torch.full(targets.shape, -torch.inf, device=self.device)  # log of the summed exponentials so far
        wanted = torch.zeros_like(total)  # the targets' logits
        for start in range(0, size, step):
            part = slice(start, min(start + step, size))
            with self._head_rows(part):
                for index, (output, window) in enumerate(zip(outputs, windows, strict=True)):
                    scores = self.logits(output, window)[:-1]
                    total[index] = total[index].logaddexp(scores.logsumexp(1))
                    place = targets[index] - start
                    here = (place >= 0) & (place < scores.shape[1])
                    wanted[index, here] = scores[here, place[here]]
        return list(total - wanted)

    def decoded(self, x: Tensor, window: Tensor) -> Any:
        """The decoder's own output object, final norm included, with `x` `[1, T, D]` as the last block's output."""

        def skip(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            return x if index == self.n_blocks - 1 else _split_hidden(args, kwargs)[0]

        with self._replaced_blocks(skip):
            return self.model.get_decoder()(input_ids=window.to(self.device)[None], use_cache=False)

    def logits(self, output: Any, window: Tensor, keep: Tensor | int = 0) -> Tensor:
        """Logits `[T, V]`, fp32, for the head's rows, from the decoder's `output` for `window` `[T]`.

        `keep` are the positions wanted, if not all.
        """
        ids = window.to(self.device)[None]
        with decoder_returns(self.model.get_decoder(), output):
            logits: Tensor = self.model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits
        return logits[0].float()

    @contextmanager
    def _replaced_blocks(self, stand_in: Callable[[int, tuple[Any, ...], dict[str, Any]], Tensor]) -> Iterator[None]:
        """Replace each block's forward by `stand_in(index, args, kwargs) -> hidden`, in the block's own return form."""

        def make(index: int, block: nn.Module) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden = stand_in(index, args, kwargs)
                if index not in self._extras:
                    # Run the block once without data to learn whether it returns a tensor or a tuple.
                    meta_args, meta_kwargs = pytree.tree_map_only(Tensor, lambda t: t.to("meta"), (args, kwargs))
                    out = type(block).forward(block, *meta_args, **meta_kwargs)
                    self._extras[index] = out[1:] if isinstance(out, tuple) else None
                extra = self._extras[index]
                return hidden if extra is None else (hidden, *extra)

            return forward

        for index, block in enumerate(self.blocks):
            block.forward = make(index, block)
        try:
            yield
        finally:
            for block in self.blocks:
                del block.forward


def _vocabulary_modules(model: Any) -> tuple[str, str]:
    """Dotted names of the input embedding and of the head; raises InputError when they are not a table and a linear."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    table, linear = isinstance(embedding, (nn.Embedding, CompressedEmbedding)), is_linear(head)
    if not table or not (linear or isinstance(head, TiedHead)):
        raise InputError(f"{type(model).__name__} has no embedding table or no linear head; it is not supported")
    names = {module: name for name, module in model.named_modules()}
    return names[embedding], names[head]


def _split_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """Separate a block call's hidden states from its other arguments."""
    if args:
        return args[0], args[1:], kwargs
    return kwargs["hidden_states"], args, {k: v for k, v in kwargs.items() if k != "hidden_states"}


def _to_meta(module: nn.Module, recurse: bool = True) -> None:
    """Drop `module`'s parameters and persistent buffers; computed buffers such as rotary tables stay."""
    for child in module.modules() if recurse else [module]:
        if isinstance(child, CompressedWeight):
            child.forget()
        for name, parameter in child._parameters.items():
            if parameter is not None:
                child._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
        for name, buffer in child._buffers.items():
            if buffer is not None and name not in child._non_persistent_buffers_set:
                child._buffers[name] = buffer.to("meta")


def _computed_buffers_to(model: nn.Module, device: torch.device) -> None:
    """Move buffers that have data (computed at construction, such as rotary tables) to `device`."""
    for child in model.modules():
        for name, buffer in child._buffers.items():
            if buffer is not None and not buffer.is_meta:
                child._buffers[name] = buffer.to(device)
