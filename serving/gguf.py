"""GGUF file -> Hugging Face folder in bf16, converted once and kept in the user's cache.

transformers dequantizes GGUF tensors and rebuilds config and tokenizer from the file's metadata. It is silent
about what it drops, so this module refuses what would come out wrong (scaled RoPE, parameters the file lacks,
one part of a split file, a BOS token that gets lost) and repairs the one tokenizer it misreads. The cache key
is the SHA-256 of the file and `CONVERSION`, so a changed file or converter never meets an old result.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .durable import sha256_of
from .errors import InputError, RunError

CONVERSION = 1  # raise it when the same file would convert to something else
SOURCE_FILE = "halfweight_source.json"  # lies beside config.json: what the folder was converted from
_FLOATS = {"F64", "F32", "F16", "BF16"}


@dataclass(frozen=True)
class GGUFInfo:
    """What a GGUF header says: tensors counted by type, most frequent first, and the keys the conversion needs."""

    types: dict[str, int]
    adds_bos: bool | None
    pre_tokenizer: str | None
    end_of_turn: int | None

    @property
    def note(self) -> str:
        """One phrase for reports: were these weights quantized before, and how."""
        quantized = ", ".join(f"{n} {kind}" for kind, n in self.types.items() if kind not in _FLOATS)
        if quantized:
            return f"weights were already quantized ({quantized}) before conversion to bf16"
        return f"converted to bf16 from a GGUF file in {', '.join(self.types)}"


def cache_root() -> Path:
    """`$HALFWEIGHT_CACHE`, else `$XDG_CACHE_HOME/halfweight`, else `~/.cache/halfweight`; created if missing."""
    named, xdg = os.environ.get("HALFWEIGHT_CACHE"), os.environ.get("XDG_CACHE_HOME")
    root = Path(named).expanduser() if named else Path(xdg or Path.home() / ".cache") / "halfweight"
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot create the cache folder {root} ({error}); set HALFWEIGHT_CACHE to another") from None
    return root.resolve()


def cached_folder(sha256: str) -> Path | None:
    """The finished conversion of the file with this hash, or None."""
    folder = _folder_for(sha256)
    return folder if (folder / "config.json").is_file() else None


def stored_note(folder: Path) -> str | None:
    """The note a conversion left in `folder`; None for a folder that is not a conversion."""
    try:
        note = json.loads((folder / SOURCE_FILE).read_text(encoding="utf-8"))["note"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return note if isinstance(note, str) else None


def converted_folder(path: Path, report: Callable[[str], None], note: str | None = None) -> Path:
    """The folder for the GGUF file at `path`; converts it unless the cache already has it.

    `note` replaces the generated one. Raises InputError for a file that cannot be converted, RunError when the
    work fails (disk full). The conversion grows in a sibling folder and is renamed at the end, so a killed or
    concurrent run never leaves half a model under the final name.
    """
    if not _has_magic(path):
        raise InputError(f"{path} is not a GGUF file: it does not start with the bytes 'GGUF'")
    sha256 = sha256_of(path)
    if (ready := cached_folder(sha256)) is not None:
        return ready
    info = inspect_gguf(path)
    from safetensors import SafetensorError

    folder = _folder_for(sha256)
    report(f"converting {path.name} to bf16 safetensors, once; this can take a minute or more")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            _convert(path, work, info)
            source = {
                "file": path.name,
                "sha256": sha256,
                "note": note or info.note,
                "tensor_types": info.types,
            }
            (work / SOURCE_FILE).write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")
            try:
                os.rename(work, folder)
            except OSError:  # another process finished first; its result is the same
                if cached_folder(sha256) is None:
                    raise
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise RunError(f"converting {path.name} into {cache_root()} failed: {_one_line(error)}") from error
    report(f"converted {path.name} into {folder}")
    return folder


def inspect_gguf(path: Path) -> GGUFInfo:
    """Read the header of a GGUF file and check that its tensor data is all there.

    Raises InputError for a corrupt, truncated or split file, and for RoPE scaling, which transformers drops.
    """
    _require_packages()
    from gguf import GGUFReader, GGUFValueType

    try:
        reader = GGUFReader(path)
        end = max((int(t.data_offset) + int(t.n_bytes) for t in reader.tensors), default=0)
        counts = Counter(t.tensor_type.name for t in reader.tensors)
        names = {t.name for t in reader.tensors}

        def value(key: str) -> Any:
            field = reader.get_field(key)
            if field is None:
                return None
            part = field.parts[field.data[0]]
            return bytes(part).decode() if field.types[0] == GGUFValueType.STRING else part.tolist()[0]

        architecture = value("general.architecture")
        scaling, parts = value(f"{architecture}.rope.scaling.type"), value("split.count")
        adds_bos, pre_tokenizer = value("tokenizer.ggml.add_bos_token"), value("tokenizer.ggml.pre")
        end_of_turn = value("tokenizer.ggml.eot_token_id")
    except Exception as error:  # the reader indexes a memory map: bad bytes surface as any exception at all
        raise InputError(f"{path} is corrupt or truncated ({_one_line(error)}); copy or download it again") from error
    if end > path.stat().st_size:
        raise InputError(f"{path} is truncated ({path.stat().st_size} of {end} bytes); copy or download it again")
    if not names or architecture is None:
        raise InputError(f"{path} holds no language model (no tensors or no general.architecture)")
    if parts is not None and parts > 1:
        raise InputError(f"{path} is one of {parts} parts; join them with `llama-gguf-split --merge` first")
    if "rope_freqs.weight" in names or scaling not in (None, "none"):
        raise InputError(
            f"{path} uses RoPE scaling, which is lost when transformers converts GGUF; "
            "use the safetensors release of this model"
        )
    return GGUFInfo(dict(counts.most_common()), adds_bos, pre_tokenizer, end_of_turn)


def _convert(path: Path, folder: Path, info: GGUFInfo) -> None:
    """Write config, bf16 safetensors, tokenizer and generation config of the GGUF at `path` into `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    # The absolute file name: a bare one is looked up in the working directory before `parent`.
    parent, file = str(path.resolve().parent), str(path.resolve())
    with _quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(parent, gguf_file=file)
            model, loading = AutoModelForCausalLM.from_pretrained(
                parent, gguf_file=file, dtype=torch.bfloat16, output_loading_info=True, **_dense_option()
            )
        except OSError:
            raise
        except Exception as error:
            raise InputError(
                f"transformers cannot convert {path.name} ({_one_line(error)}); "
                "use the safetensors release of this model"
            ) from error
        tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
        lost = sorted({str(key) for key in (*loading["missing_keys"], *loading["mismatched_keys"])} - tied)
        if lost:
            raise InputError(
                f"{path.name} lacks {len(lost)} parameters of {type(model).__name__} ({lost[0]} ...); "
                "use the safetensors release of this model"
            )
        if info.adds_bos is not None and info.adds_bos != _adds_bos(tokenizer):
            import transformers

            raise InputError(
                f"transformers {transformers.__version__} misreads the tokenizer of {path.name} (the file says "
                f"add_bos_token = {info.adds_bos}); upgrade transformers, or use the safetensors release"
            )
        _forget_gguf(model)
        config = model.config
        ends = [i for i in dict.fromkeys((config.eos_token_id, info.end_of_turn)) if i is not None]
        model.generation_config = GenerationConfig(
            bos_token_id=config.bos_token_id,
            eos_token_id=ends[0] if len(ends) == 1 else ends or None,
            pad_token_id=config.pad_token_id,
        )
        _repair_pre_tokenizer(tokenizer, info.pre_tokenizer)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _dense_option() -> dict[str, Any]:
    """Newer transformers may keep GGUF blocks packed; ask for plain tensors where the choice exists."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _forget_gguf(model: Any) -> None:
    """Make `model` an ordinary dense model again: transformers refuses to save one that came from GGUF."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    for name in ("quantization_config", "_model_name_or_path"):
        if name in vars(model.config):
            delattr(model.config, name)


def _adds_bos(tokenizer: Any) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def _repair_pre_tokenizer(tokenizer: Any, kind: str | None) -> None:
    """SmolLM splits every digit off before byte-level BPE; transformers falls back to GPT-2's split for it.

    The two differ where whitespace precedes a digit ("\\n\\n2024").
    """
    if kind == "smollm":
        from tokenizers import pre_tokenizers

        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back the progress bars and warnings of transformers; `report` says what goes on instead."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        # One loop draws its bar with plain tqdm, which no transformers switch reaches.
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _require_packages() -> None:
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"reading GGUF needs {' and '.join(missing)}: pip install 'halfweight[demo]'")


def _has_magic(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"


def _folder_for(sha256: str) -> Path:
    return cache_root() / "models" / f"{sha256[:24]}-v{CONVERSION}"


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."
