"""Feed damaged checkpoints, recipes and calibration texts to their readers, and see that nothing but a refusal comes.

    python scripts/fuzz.py --inputs 200000 [--targets checkpoint recipe text] [--seed 0] [--keep FOLDER]

An input is a valid one with random damage: bytes, words or JSON values changed, cut out, repeated or swapped with those
of another. What gives an outcome not seen before (a different error, or acceptance by another way) is damaged further.
A reader may accept an input, or refuse it with the project's own error in one line. Anything else, such as another
exception, an answer after more than --seconds, or memory beyond --memory MB, is a failure: the input is kept in --keep
and the exit code is 1. An accepted compressed linear must also compute: its kernels read what the file says.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save

from halfweight import Recipe
from halfweight.compress.calibration import text_windows
from halfweight.compress.passes import PASSES, selection
from halfweight.compress.recipe import Calibration, named_recipes
from halfweight.compress.statistics import InputStatistics
from halfweight.eval.text import read_text
from halfweight.serving.checkpoint import INDEX_NAME, Checkpoint, read_tensor
from halfweight.serving.errors import HalfweightError, InputError
from halfweight.serving.linear import CompressedLinear
from halfweight.serving.scheme import ArtifactConfig
from halfweight.serving.storage import pack_selection, pack_weight
from halfweight.triton_kernels.formats import FormatError

Files = dict[str, bytes]  # an input: the files of a folder by name

N, K = 16, 64
LINEAR = "model.layers.0.mlp.down_proj"
SHARD = "halfweight-00001-of-00001.safetensors"
SHAPES = {f"model.layers.{i}.{name}": (N, K) for i in range(2) for name in ("self_attn.q_proj", "mlp.down_proj")}
STAGES: list[dict[str, Any]] = [
    {"pass": "magnitude", "pattern": "2:4"},
    {"pass": "rtn", "group_size": 16},
    {"pass": "rtn", "bits": 8, "group_size": 32, "symmetric": True},
    {"pass": "rtn", "group_size": 8, "along": "outputs"},
    {"pass": "gqsa", "pattern": "2:4", "group_size": 16},
    {"pass": "gqsa", "pattern": "1x8", "density": 0.5},
    {"pass": "gqsa", "pattern": "1x8", "density": 0.5, "balance": "layer", "mask": "wanda"},
    {"pass": "gqsa", "pattern": "8x1", "density": 0.5},
    {"pass": "keep", "selection": {"sparsity": 0.3, "score": "l2", "channels": 0.5}},
    {"pass": "keep", "selection": {"sparsity": 0.3, "threshold": "topk"}},
    {"pass": "keep", "selection": {"sparsity": 0.3, "threshold": "prompt"}},
    {"pass": "rtn", "group_size": 8, "along": "outputs", "selection": {"sparsity": 0.3, "channels": 0.2}},
]
WORDS = [b"-1", b"0", b"1e999", b"nan", b"null", b"true", b"[", b"{", b"}", b'"', b":", b"\x00", b"\xff\xfe", b"2:4"]
WORDS += [b"1x16", b"9" * 30, b"../", b"!!python/object:os.system", b"&a [*a]", b"\n", b"\r\n", b"  ", b"- ", b"pass"]
VALUES: list[Any] = [None, True, -1, 0, 1, 2**31, 2**63, 1e308, "", "x", "2:4", "1x16", [], {}, [[]], {"": 0}, "../x"]


@dataclass
class Target:
    """A reader, what it starts from, and what has come of it."""

    name: str
    seeds: list[Files]
    read: Callable[[Path], str]
    corpus: list[Files] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=200_000, help="in total, over all targets")
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=5.0, help="most that one input may take")
    parser.add_argument("--memory", type=int, default=1500, help="MB of resident memory that the process may reach")
    parser.add_argument("--keep", type=Path, default=Path("build/fuzz"), help="where inputs that failed are kept")
    args = parser.parse_args()
    torch.set_num_threads(1)
    failures = []
    for name in args.targets:
        target = TARGETS[name]()
        failures += run(target, -(-args.inputs // len(args.targets)), args.seed, args.seconds, args.memory, args.keep)
        total = sum(target.outcomes.values())
        print(f"{name}: {total} inputs, {len(target.outcomes)} outcomes, {target.outcomes['accepted']} accepted")
        for outcome, count in target.outcomes.most_common(12):
            print(f"  {count:8} {outcome[:140]}")
    for failure in failures:
        print(f"FAILED {failure}")
    sys.exit(1 if failures else 0)


def run(target: Target, inputs: int, seed: int, seconds: float, memory: int, keep: Path) -> list[str]:
    """Give `inputs` damaged inputs to the target; returns one line for each failure (ten end the run)."""
    rng = random.Random(f"{target.name} {seed}")
    failures: list[str] = []
    target.corpus += target.seeds
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for number in range(inputs):
            # The seeds come first, so that what is undamaged must be accepted.
            whole = number < len(target.seeds)
            origin = rng.choice(target.seeds if rng.random() < 0.5 else target.corpus)
            files = target.seeds[number] if whole else damaged(origin, target.corpus, rng)
            for old in folder.iterdir():
                old.unlink()
            for name, content in files.items():
                (folder / name).write_bytes(content)
            begin = time.monotonic()
            outcome, problem = observe(target.read, folder)
            if time.monotonic() - begin > seconds:
                problem = f"took {time.monotonic() - begin:.1f} s"
            if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 > memory:
                problem = f"the process needs more than {memory} MB"
            if whole and outcome != "accepted":
                problem = f"an undamaged input gave: {outcome}"
            if problem:
                failures.append(f"{target.name} input {number}: {problem}; kept in {keep_input(files, keep, number)}")
                if len(failures) == 10:
                    break
            if outcome not in target.outcomes and len(target.corpus) < 4000:
                target.corpus.append(files)
            target.outcomes[outcome] += 1
    return failures


def observe(read: Callable[[Path], str], folder: Path) -> tuple[str, str]:
    """`(outcome, problem)` of reading; the outcome is the message without what differs from input to input."""
    try:
        return read(folder), ""
    except HalfweightError as refusal:
        message = str(refusal)
        problem = "" if message and "\n" not in message else f"a refusal that is not one line: {message!r}"
        return re.sub(r"'[^']*'|\"[^\"]*\"|-?\d[\d.e+-]*|\S*/\S*", "_", message)[:200], problem
    except Exception as error:  # that is what this script looks for
        return f"{type(error).__name__}", f"{type(error).__name__}: {error}"


def keep_input(files: Files, keep: Path, number: int) -> Path:
    """Write the files of a failed input below `keep`."""
    folder = keep / str(number)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


# --- damage ---


def damaged(files: Files, corpus: Sequence[Files], rng: random.Random) -> Files:
    """A copy with one to four changes in one of its files."""
    name = rng.choice(list(files))
    content = files[name]
    for _ in range(rng.randint(1, 4)):
        other = rng.choice(corpus).get(name, b"")
        change = rng.choice((_bit, _bytes, _words, _splice, _structure, _structure, _structure))
        content = change(content, other, rng)
    return {**files, name: content[: 1 << 20]}


def _bit(content: bytes, other: bytes, rng: random.Random) -> bytes:
    """Flip a bit."""
    changed = bytearray(content or b"x")
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _bytes(content: bytes, other: bytes, rng: random.Random) -> bytes:
    """Remove or repeat some bytes."""
    i, j = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    return rng.choice((content[:i] + content[j:], content[:j] + content[i:], content[:i]))


def _words(content: bytes, other: bytes, rng: random.Random) -> bytes:
    """Insert, or put in place of a number, something that readers may not expect."""
    word = rng.choice(WORDS)
    numbers = list(re.finditer(rb"-?\d+\.?\d*", content[:4096]))
    if numbers and rng.random() < 0.5:
        found = rng.choice(numbers)
        return content[: found.start()] + word + content[found.end() :]
    i = rng.randrange(len(content) + 1)
    return content[:i] + word + content[i:]


def _splice(content: bytes, other: bytes, rng: random.Random) -> bytes:
    """The beginning of one and the end of another."""
    return content[: rng.randrange(len(content) + 1)] + other[rng.randrange(len(other) + 1) :]


def _structure(content: bytes, other: bytes, rng: random.Random) -> bytes:
    """Change a value, or a key, of a JSON or YAML text, or of a safetensors header whose length stays right."""
    length = int.from_bytes(content[:8], "little")
    framed = 0 < length <= len(content) - 8
    try:
        data = yaml.safe_load(content[8 : 8 + length] if framed else content)  # JSON is YAML
        json.dumps(data)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):  # such as a list that contains itself
        return _bytes(content, other, rng)
    places = list(_places(data))
    if not places:
        return content
    owner, key = rng.choice(places)
    match rng.randrange(4):
        case 0:
            owner[key] = rng.choice(VALUES)
        case 1:
            del owner[key]
        case 2 if isinstance(owner, dict):
            owner[rng.choice(["", "x", "weight", str(key) + "x"])] = owner.pop(key)
        case _:
            source, place = rng.choice(places)
            owner[key] = json.loads(json.dumps(source.get(place) if isinstance(source, dict) else data))
    text = json.dumps(data).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + length :] if framed else text


def _places(data: Any) -> list[tuple[Any, Any]]:
    """Every `(container, key or index)` inside `data`."""
    children: list[tuple[Any, Any]] = []
    if isinstance(data, dict):
        children = [(data, key) for key in data]
    elif isinstance(data, list):
        children = [(data, index) for index in range(len(data))]
    return children + [place for owner, key in children for place in _places(owner[key])]


# --- targets ---


def checkpoints() -> Target:
    """Compressed linears of every storage, each in a folder of its own."""
    generator = torch.Generator().manual_seed(0)
    seeds = []
    for settings in STAGES:
        kind = PASSES[settings["pass"]]
        stage = kind.config(**{key: value for key, value in settings.items() if key != "pass"})
        stage = stage.for_linear(LINEAR, (N, K))
        statistics = InputStatistics(K, kind.needs == "hessian", torch.device("cpu"))
        inputs = torch.randn(256, K, generator=generator)
        statistics.add(inputs)
        result = kind.solve(torch.randn(N, K, generator=generator), statistics, stage)
        scheme = stage.scheme((N, K))
        tensors = pack_weight(result.weight, scheme, result.quantized, result.mask)
        if stage.selection is not None:
            chosen = selection.choose(result.weight, [inputs], stage.selection, scheme, torch.float32)
            tensors |= pack_selection(scheme, chosen)
        named = {f"{LINEAR}.{suffix}": tensor for suffix, tensor in tensors.items()}
        config = {"model_type": "llama", "quantization_config": ArtifactConfig(linears={LINEAR: scheme}).to_json()}
        index = {"metadata": {}, "weight_map": dict.fromkeys(named, SHARD)}
        files = {"config.json": json.dumps(config), INDEX_NAME: json.dumps(index)}
        seeds.append({name: text.encode() for name, text in files.items()} | {SHARD: save(named)})
    schemes = {_config(files).linears[LINEAR] for files in seeds}

    def read(folder: Path) -> str:
        checkpoint = Checkpoint(folder)
        artifact = checkpoint.artifact
        if artifact is None or LINEAR not in artifact.linears:
            return "accepted without the linear"
        scheme = artifact.linears[LINEAR]
        if scheme.storage == "dense":
            return "accepted as dense"
        try:
            linear = CompressedLinear(scheme, K, N, bias=False)
            for name, buffer in list(linear.named_buffers(recurse=False)):
                info = checkpoint.info(f"{LINEAR}.{name}")
                if info.shape != tuple(buffer.shape):  # as a model's loader would
                    raise InputError(f"{folder}: {name} has another shape than its scheme")
                setattr(linear, name, read_tensor(name, info))
            linear.check()
        except FormatError as error:
            raise InputError(f"{folder}: {error}") from None
        assert linear.dense_weight().shape == (N, K)
        if scheme in schemes:  # kernels are compiled for a scheme; new ones would take the time
            assert linear(torch.ones(2, K)).shape == (2, N)
        return "accepted"

    return Target("checkpoint", seeds, read)


def _config(files: Files) -> ArtifactConfig:
    return ArtifactConfig.parse(json.loads(files["config.json"])["quantization_config"], "config.json")


def recipes() -> Target:
    """The shipped recipes."""

    def read(folder: Path) -> str:
        Recipe.load(folder / "recipe.yaml").resolve(SHAPES)
        return "accepted"

    return Target("recipe", [{"recipe.yaml": path.read_bytes()} for path in named_recipes().values()], read)


def texts() -> Target:
    """Calibration texts: plain, JSON lines, and compressed ones."""
    plain = "".join(f"Line {i} of a text, with ümläuts and numbers {i * i}.\n" for i in range(40)).encode()
    lines = b"".join(json.dumps({"text": f"document {i} " * 8}).encode() + b"\n" for i in range(20))
    settings = Calibration(samples=4, seqlen=16)

    def read(folder: Path) -> str:
        (file,) = folder.iterdir()
        characters = [ord(character) for character in read_text(file)[:4096]]
        text_windows(torch.tensor(characters), settings, None)
        return "accepted"

    seeds = [{"text.txt": plain}, {"text.jsonl": lines}, {"text.txt.gz": gzip.compress(plain, mtime=0)}]
    return Target("text", [*seeds, {"text.jsonl.gz": gzip.compress(lines, mtime=0)}], read)


TARGETS: dict[str, Callable[[], Target]] = {"checkpoint": checkpoints, "recipe": recipes, "text": texts}


if __name__ == "__main__":
    main()
