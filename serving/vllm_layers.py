"""vLLM's layers over halfweight's compressed modules: what vLLM calls to create, load and run each of them.

A vLLM layer may stand for several linears of the checkpoint (qkv_proj, gate_up_proj), and on one of several ranks for a
part of each. While the weights load, every stored tensor is cut to this rank's part (`sharding.py`) and kept; then the
parts become `CompressedLinear` modules, one for all where their schemes agree. With a low-rank branch, or stored input
by input, every part has its own, with its own threshold and V.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from ..triton_kernels.formats import FormatError
from ..triton_kernels.formats.groups import Groups
from .checkpoint import Checkpoint
from .embedding import CompressedEmbedding
from .errors import InputError
from .linear import CompressedLinear, CompressedWeight, check_weights
from .scheme import QUANT_METHOD, ArtifactConfig, LinearScheme
from .sharding import along_columns, along_rows, column_scheme, gather_groups, row_scheme, rows_axis, stored_rows
from .storage import tensor_specs

_SHARDS = {"q": 0, "k": 1, "v": 2, None: 0}  # vLLM's names for the parts of a fused layer; others are numbers

logger = init_logger("vllm.halfweight")


class HalfweightConfig(QuantizationConfig):
    """vLLM's view of an `ArtifactConfig`: which method serves which layer."""

    def __init__(self, artifact: ArtifactConfig) -> None:
        super().__init__()
        self.artifact = artifact
        self.linears: dict[str, LinearScheme] = dict(artifact.linears)  # by vLLM's module names
        self.verified: set[tuple[Any, ...]] = set()

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> HalfweightConfig:
        """Raises InputError for a version or a scheme that this halfweight does not read, and for inputs that a prompt
        chooses."""
        artifact = ArtifactConfig.parse(config, "config.json")
        if artifact.prompt_static:
            raise InputError(
                "config.json: quantization_config has linears with threshold: prompt, but in vLLM a linear cannot tell"
                " whose prompt its tokens follow; use halfweight.load, or compress with threshold: topk"
            )
        selects = any(scheme.selection is not None for scheme in artifact.linears.values())
        if selects and artifact.prefill == "dense":  # linears get [tokens, K], prompts and new tokens mixed
            logger.warning(
                "config.json: quantization_config.prefill is dense, but in vLLM a linear cannot tell the tokens of a"
                " prompt from new ones: prompts select their inputs, too, as in halfweight's scores"
            )
        return cls(artifact)

    def get_name(self) -> Any:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Refuse a damaged folder before any worker starts: index, headers and file sizes are checked here."""
        if Path(model_name).is_dir():
            Checkpoint(model_name)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.linears = hf_to_vllm_mapper.apply_dict(self.linears)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method for a layer that vLLM calls `prefix`; raises InputError for what this plugin cannot serve."""
        if isinstance(layer, ParallelLMHead):
            if self.artifact.embedding is not None and prefix not in self.linears:
                return TiedHeadMethod()
            return self._head(prefix)
        if isinstance(layer, VocabParallelEmbedding):
            return None if self.artifact.embedding is None else CompressedEmbeddingMethod(self)
        if not isinstance(layer, LinearBase):
            self._refuse_experts(prefix)
            return None
        names = self._parts(prefix)
        schemes = [self.linears.get(name) for name in names]
        if all(scheme is None or scheme.storage == "dense" for scheme in schemes):
            return UnquantizedLinearMethod()
        for name, scheme in zip(names, schemes, strict=True):
            if scheme is None or scheme.storage == "dense":
                raise InputError(f"{name} is dense but {prefix} fuses it with compressed linears; compress all or none")
        return CompressedLinearMethod(self, names)

    def _head(self, prefix: str) -> QuantizeMethodBase | None:
        """The method of a head with tensors of its own."""
        if prefix not in self.linears:
            return None
        if self.linears[prefix].input_major:  # vLLM pads a head's outputs, which are not its rows then
            raise InputError(f"{prefix} is a head stored input by input, which the vLLM plugin cannot serve yet")
        return CompressedLinearMethod(self, [prefix])

    def _parts(self, prefix: str) -> list[str]:
        """The checkpoint's linears behind the layer `prefix`."""
        parent, _, own = prefix.rpartition(".")
        if prefix in self.linears or own not in self.packed_modules_mapping:
            return [prefix]
        return [f"{parent}.{part}" for part in self.packed_modules_mapping[own]]

    def _refuse_experts(self, prefix: str) -> None:
        inside = next((name for name in self.linears if name.startswith(f"{prefix}.experts.")), None)
        if inside is not None:
            raise InputError(f"{inside} is an expert, which the vLLM plugin cannot serve yet; use halfweight.load")


@dataclass
class _Part:
    """One linear of the checkpoint as this rank holds it: `rows` outputs and `columns` inputs, stored by `scheme`."""

    name: str
    scheme: LinearScheme
    rows: int
    columns: int
    tensors: dict[str, Tensor] = field(default_factory=dict)


class CompressedLinearMethod(LinearMethodBase):
    """Runs a vLLM linear, or an untied head, that stands for the checkpoint's linears `names`."""

    def __init__(self, config: HalfweightConfig, names: list[str]) -> None:
        self.config, self.names = config, names
        self.parts: list[_Part] = []

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Register a placeholder for every stored tensor, under its own name; its loader keeps this rank's part."""
        cuts = input_size // input_size_per_partition
        sizes = output_partition_sizes
        if len(self.names) == 1:  # fused on disk already, if at all
            sizes = [sum(output_partition_sizes)]
        elif len(self.names) != len(sizes):
            raise InputError(f"{', '.join(self.names)} are not the {len(sizes)} parts of the layer that fuses them")
        self.inner, self.by_outputs = [*output_partition_sizes], sum(output_partition_sizes) < output_size
        self.dtype, self.device = params_dtype, torch.get_default_device()
        for name, rows in zip(self.names, sizes, strict=True):
            try:
                scheme = column_scheme(self.config.linears[name], input_size, cuts)
                if self.by_outputs:
                    scheme = row_scheme(scheme, self.inner if len(self.names) == 1 else [rows])
                if scheme.storage == "transposed_groups" and getattr(layer, "num_kv_head_replicas", 1) > 1:
                    raise InputError("its groups are not cut for more ranks than key and value heads; use fewer ranks")
                self.parts.append(_Part(name, scheme, rows, input_size_per_partition))
                suffixes = tensor_specs(scheme, (rows, input_size_per_partition))
            except (InputError, FormatError) as error:
                raise InputError(f"{name}: {error}") from None
            for suffix, spec in suffixes.items():
                self._placeholder(layer, suffix, spec.dtype or params_dtype, cuts)

    def _placeholder(self, layer: nn.Module, path: str, dtype: torch.dtype, cuts: int) -> None:
        owner, _, own = path.rpartition(".")
        if owner and not hasattr(layer, owner):
            layer.add_module(owner, nn.Module())
        target = layer.get_submodule(owner)
        if hasattr(target, own):
            return  # of another part

        def load(_: nn.Parameter, tensor: Tensor, shard: Any = None) -> None:
            self._take(layer, self.parts[_SHARDS.get(shard, shard)], path, tensor, cuts)

        target.register_parameter(own, _placeholder(dtype, load))

    def _take(self, layer: Any, part: _Part, path: str, tensor: Tensor, cuts: int) -> None:
        """Keep this rank's part of a stored tensor."""
        rank = int(getattr(layer, "tp_rank", 0))
        if cuts > 1:
            kept = along_columns(part.scheme, path, tensor, rank, cuts)
        else:
            pieces = self._ranges(layer, part, stored_rows(part.scheme, path, tensor), rank)
            cut = [along_rows(part.scheme, path, tensor, start, count) for start, count in pieces]
            kept = cut[0] if len(cut) == 1 else torch.cat(cut, rows_axis(part.scheme, path) or 0)
            if isinstance(layer, VocabParallelEmbedding) and not path.startswith("V"):
                kept = _padded(kept, part.rows)
        part.tensors[path] = kept.to(self.device, copy=True)

    def _ranges(self, layer: Any, part: _Part, stored: int | None, rank: int) -> list[tuple[int, int]]:
        """Rows of the stored `stored` (None: as many as the part has) that this rank holds, as (start, count)."""
        if stored is None or stored == part.rows:
            return [(0, part.rows)]
        world = int(getattr(layer, "tp_size", 1))
        if isinstance(layer, VocabParallelEmbedding):
            start = layer.shard_indices.org_vocab_start_index
            return [(start, layer.shard_indices.org_vocab_end_index - start)]
        if not self.by_outputs:
            return [(0, stored)]
        if len(self.parts) > 1:
            copies = max(1, world * part.rows // stored)  # of key and value heads, when there are fewer than ranks
            return [(rank // copies * part.rows, part.rows)]
        copies, pieces, offset = int(getattr(layer, "num_kv_head_replicas", 1)), [], 0
        for number, size in enumerate(self.inner):  # several, where the checkpoint fuses what vLLM cuts one by one
            same = copies if number else 1  # queries come first, and have no copies
            pieces.append((offset + rank // same * size, size))
            offset += world * size // same
        return pieces

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Turn the loaded parts into modules, check them, and choose what runs them; raises InputError for bad ones."""
        for path in {path for part in self.parts for path in part.tensors}:
            owner, _, own = path.rpartition(".")
            delattr(layer.get_submodule(owner), own)
        _require_all(self.parts)
        for part in self.parts:
            if self.by_outputs and part.scheme.storage == "transposed_groups":
                self._gather(layer, part)
        fused = _fuse(self.parts)
        modules = [_linear(part, self.dtype) for part in fused]
        for module in modules:
            self._prepare(module)
        layer.halfweight = nn.ModuleList(modules)
        self.parts = []

    def _gather(self, layer: Any, part: _Part) -> None:
        """Cut kept groups along the outputs, which their tensors show only together."""
        rows = part.rows * int(layer.tp_size)
        pieces = self._ranges(layer, part, rows, int(layer.tp_rank))
        whole = Groups(*(part.tensors[name] for name in Groups._fields))
        try:
            own = gather_groups(self.config.linears[part.name], whole, (rows, part.columns), pieces)
        except FormatError as error:
            raise InputError(f"{part.name}: {error}; the file is damaged or hostile") from None
        part.tensors |= own._asdict()

    def _prepare(self, module: CompressedWeight) -> None:
        prepare(module, self.dtype, self.config)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x` `[..., K]` -> `[..., N]`, the parts side by side."""
        outputs = [module(x) for module in layer.halfweight]
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        return y if bias is None else y + bias


class CompressedEmbeddingMethod(QuantizeMethodBase):
    """The input embedding as integer rows; its vocabulary may be padded and cut over ranks."""

    def __init__(self, config: HalfweightConfig) -> None:
        assert config.artifact.embedding is not None  # it has one
        self.config, self.scheme = config, config.artifact.embedding.dense
        self.tensors: dict[str, Tensor] = {}

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        self.shape = (sum(output_partition_sizes), input_size)
        self.dtype, self.device = params_dtype, torch.get_default_device()
        for name, spec in tensor_specs(self.scheme, self.shape).items():
            load = self._loader(layer, name, spec.shape)
            layer.register_parameter(name, _placeholder(spec.dtype or params_dtype, load))

    def _loader(self, layer: Any, name: str, shape: tuple[int, ...]) -> Callable[..., None]:
        def load(_: nn.Parameter, tensor: Tensor) -> None:
            start, end = layer.shard_indices.org_vocab_start_index, layer.shard_indices.org_vocab_end_index
            if tensor.shape[1:] != shape[1:] or tensor.shape[0] != layer.org_vocab_size:
                raise InputError(f"embedding: {name} has shape {list(tensor.shape)}; the file is damaged")
            self.tensors[name] = _padded(tensor[start:end], shape[0]).to(self.device, copy=True)

        return load

    def process_weights_after_loading(self, layer: Any) -> None:
        """As of a linear."""
        for name in self.tensors:
            delattr(layer, name)
        module = CompressedEmbedding(self.scheme, *self.shape, device="meta", dtype=self.dtype)
        _fill(module, self.tensors, self.dtype, "the embedding")
        module._like = torch.empty(0, dtype=self.dtype, device=self.device)
        self.tensors = {}
        prepare(module, self.dtype, self.config)
        layer.halfweight = module

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        """Rows `[..., hidden]`; models that scale their embeddings do so themselves in vLLM."""
        rows: Tensor = layer.halfweight(input_)
        return rows

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Logits, for models whose head is the embedding itself."""
        logits: Tensor = layer.halfweight.logits(x, bias)
        return logits


class TiedHeadMethod(QuantizeMethodBase):
    """The head of a model whose embedding is compressed: it has no tensors of its own."""

    def create_weights(self, layer: nn.Module, *_: Any, **__: Any) -> None:
        pass

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """Let `layer` read the embedding's tensors."""
        layer.tied_to = (embed_tokens,)  # in a tuple, or its tensors would be listed twice
        return layer

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x` `[..., hidden]` -> this rank's logits."""
        logits: Tensor = layer.tied_to[0].halfweight.logits(x, bias)
        return logits


def _placeholder(dtype: torch.dtype, load: Callable[..., None]) -> nn.Parameter:
    """An empty parameter under the name of a stored tensor, so that vLLM calls `load` with that tensor."""
    parameter = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
    parameter.weight_loader = load  # type: ignore[attr-defined]
    return parameter


def _padded(tensor: Tensor, rows: int) -> Tensor:
    """`tensor` of integers with rows of code, zero point and scale 0 after its own, up to `rows`."""
    return torch.cat([tensor, tensor.new_zeros(rows - len(tensor), *tensor.shape[1:])])


def _require_all(parts: list[_Part]) -> None:
    """Raise InputError when a tensor of one of `parts` was not loaded."""
    for part in parts:
        for suffix in tensor_specs(part.scheme, (part.rows, part.columns)):
            if suffix not in part.tensors:
                raise InputError(f"{part.name}: tensor {suffix} is missing from the checkpoint; download it again")


def _fuse(parts: list[_Part]) -> list[_Part]:
    """One part with all rows where the formats allow it, else `parts`."""
    first = parts[0]
    alike = all(part.scheme == first.scheme for part in parts)
    if len(parts) == 1 or not alike or first.scheme.low_rank is not None or not first.scheme.rows_apart:
        return parts
    joined = {name: torch.cat([part.tensors.pop(name) for part in parts]) for name in [*first.tensors]}
    return [_Part(f"{first.name} and the others", first.scheme, sum(p.rows for p in parts), first.columns, joined)]


def _linear(part: _Part, dtype: torch.dtype) -> CompressedLinear:
    module = CompressedLinear(part.scheme, part.columns, part.rows, False, "meta", dtype)
    _fill(module, part.tensors, dtype, part.name)
    part.tensors = {}
    return module


def _fill(module: CompressedWeight, tensors: Mapping[str, Tensor], dtype: torch.dtype, name: str) -> None:
    """Give `module` its loaded tensors and check them; raises InputError naming `name`."""
    typed = {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}
    try:
        module.load_state_dict(typed, assign=True)
    except RuntimeError as error:
        raise InputError(f"{name}: {' '.join(str(error).split())}; the file is damaged") from None
    check_weights(nn.ModuleDict({"weight": module}), name)


def prepare(module: CompressedWeight, dtype: torch.dtype, config: HalfweightConfig) -> None:
    """Check the kernels for this kind of module once per process, choose one, and say which and why."""
    inside = [m for m in module.modules() if isinstance(m, CompressedWeight)]
    for weight in inside:
        kind = (weight.op, weight.scheme, weight.shape)
        if kind not in config.verified:
            config.verified.add(kind)
            for tokens in (1, 8):
                weight.verify(dtype, tokens)
            chosen = weight.prepare(dtype)
            logger.info("%s [%d, %d]: %s, %s", weight.scheme.pattern, *weight.shape, chosen.backend, chosen.reason)
        weight.prepare(dtype)
