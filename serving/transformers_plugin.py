"""halfweight checkpoints in transformers: `AutoModelForCausalLM.from_pretrained(DIR)` after `import halfweight`.

`register` adds one quantization method to transformers' registry; `plugin_hook.py` calls it at the right moment.

Failing loudly without halfweight: transformers >= 5.0 skips an unknown quantization method and fills the compressed
linears with random numbers. The weights therefore carry halfweight's own file names (see `checkpoint.INDEX_NAME`);
only this plugin tells transformers to look for them, through the config's `transformers_weights`.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import MethodType, ModuleType
from typing import Any

from .checkpoint import INDEX_NAME, WEIGHTS_STEM, Checkpoint, read_header
from .core_inputs import follow_prompts
from .errors import InputError
from .linear import check_weights, core_inputs, read_all_in_prefill
from .scheme import QUANT_METHOD, ArtifactConfig
from .skeleton import check_stored, swap_modules


def register(registry: ModuleType) -> None:
    """Add halfweight's config and quantizer to `registry` (the module transformers.quantizers.auto); idempotent."""
    if QUANT_METHOD in registry.AUTO_QUANTIZER_MAPPING:
        return
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class HalfweightConfig(QuantizationConfigMixin):
        """transformers' view of an `ArtifactConfig`; `to_dict` gives back exactly what config.json held."""

        def __init__(self, **fields: Any) -> None:
            self.quant_method = QUANT_METHOD
            self.artifact = ArtifactConfig.parse({"quant_method": QUANT_METHOD, **fields}, "config.json")

        def to_dict(self) -> dict[str, Any]:
            return self.artifact.to_json()

        def to_diff_dict(self) -> dict[str, Any]:
            return self.to_dict()

        def __repr__(self) -> str:
            return f"HalfweightConfig({len(self.artifact.linears)} linears)"

    class HalfweightQuantizer(HfQuantizer):
        """Swaps the compressed modules in before loading and checks their buffers after."""

        requires_calibration = True

        def update_attn_implementation(self, config: Any) -> Any:
            if Path(config.name_or_path).is_dir():
                Checkpoint(config.name_or_path)  # refuses a damaged index or header, in one line
            config.transformers_weights = INDEX_NAME
            return config

        # The hook that sees the config before files are resolved was called this until transformers 5.16.
        update_tp_plan = update_attn_implementation

        def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **_: Any) -> None:
            swap_modules(model, self.quantization_config.artifact)
            files = [Path(file) for file in checkpoint_files or []]
            check_stored(model, {name: info for file in files for name, info in read_header(file).items()})

        def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
            check_weights(model, model.config.name_or_path or "model")
            if self.quantization_config.artifact.prefill == "dense":
                read_all_in_prefill(model)
            follow_prompts(model, core_inputs(model))
            _save_under_own_names(model)
            return model

        def is_serializable(self, *_: Any, **__: Any) -> bool:
            return True

        @property
        def is_trainable(self) -> bool:
            return True  # adapters on top of it: the compressed weights are buffers, and gradients pass through them

    registry.register_quantization_config(QUANT_METHOD)(HalfweightConfig)
    registry.register_quantizer(QUANT_METHOD)(HalfweightQuantizer)


def _save_under_own_names(model: Any) -> None:
    """Make this model's `save_pretrained` use halfweight's file names, so that a re-saved folder fails loudly too."""
    model.save_pretrained = MethodType(_save_pretrained, model)


def _save_pretrained(self: Any, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
    """transformers' `save_pretrained`, then the renaming; uploads come after it, so that they carry the right names."""
    push_to_hub = kwargs.pop("push_to_hub", False)
    type(self).save_pretrained(self, save_directory, *args, **kwargs)
    if not getattr(self, "_hf_peft_config_loaded", False):
        rename_weights(Path(save_directory))
    if push_to_hub:
        raise InputError(
            f"push_to_hub is not supported; upload the folder {save_directory} with the hf command instead"
        )


def rename_weights(folder: Path) -> None:
    """Rename transformers' `model*.safetensors` in `folder` to halfweight's names and write the index for them."""
    shards = sorted(folder.glob("model*.safetensors"))
    names = {shard: f"{WEIGHTS_STEM}-{i:05d}-of-{len(shards):05d}.safetensors" for i, shard in enumerate(shards, 1)}
    for stale in folder.glob(f"{WEIGHTS_STEM}-*.safetensors"):
        stale.unlink()
    weight_map = {tensor: name for shard, name in names.items() for tensor in read_header(shard)}
    for shard, name in names.items():
        shard.rename(folder / name)
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    write_index(folder, weight_map)


def write_index(folder: Path, weight_map: dict[str, str], stem: str = WEIGHTS_STEM) -> None:
    """Write the shard index `STEM.safetensors.index.json` of `folder` from tensor name -> file name."""
    total = sum(
        info.nbytes for file in sorted(set(weight_map.values())) for info in read_header(folder / file).values()
    )
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
