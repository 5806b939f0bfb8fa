"""The recipe: one pydantic schema behind YAML files, CLI flags and Python."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from functools import reduce
from importlib import resources
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..serving.errors import InputError, did_you_mean
from ..serving.scheme import FUSED, LinearScheme, parse_nm, parse_output_group
from ..serving.storage import tensor_specs
from ..triton_kernels.formats import FormatError
from .passes import PASSES, StageConfig
from .passes.base import IntegerSettings
from .search.config import CHOICES as SEARCHES
from .search.config import Search
from .tuning.config import CHOICES, Tuning, tuning_fields

# A stage is whichever pass config its `pass` key names; type checkers only see what all stages share.
if TYPE_CHECKING:
    AnyStage = StageConfig
else:
    AnyStage = Annotated[reduce(or_, (p.config for p in PASSES.values())), Field(discriminator="pass_")]


class Calibration(BaseModel):
    """Where calibration tokens come from and how many: `samples` windows of `seqlen` tokens, chosen by `seed`.

    `data` is `builtin` (the text that ships with halfweight), `self` (text sampled from the model), a `.txt`, `.jsonl`
    or `.jsonl.gz` file, or a dataset's name on the hub.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: str = "builtin"
    samples: int = Field(default=32, ge=1)
    seqlen: int = Field(default=1024, ge=2)
    seed: int = Field(default=0, ge=0)


class Embeddings(IntegerSettings):
    """How to round the embedding and the head, row by row in groups along the hidden size; tied ones are one table.

    The range search weighs all weights alike.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: Literal[2, 3, 4, 8] = 8


class Basis(BaseModel):
    """Which changes of basis are folded into the weights before anything else is done (`basis.py`): channels are sorted
    along the `residual` stream and inside of every `ffn`, for stages that prune or scale `group_size` inputs together,
    and heads of `values` are turned into their principal components."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    axes: tuple[Literal["residual", "ffn", "values"], ...] = Field(default=("residual", "ffn", "values"), min_length=1)
    group_size: int = Field(default=16, ge=1)


class Recipe(BaseModel):
    """What to do to a model: `stages` in order, the calibration that informs them, integers for the `embeddings`, the
    `search` for what their selections read, and the `tuning` that follows. The model's `basis` changes first.

    Where linears select their inputs, they do so for single tokens, and read everything when a sequence brings more, as
    prompts do. `prefill: masked` lets the tokens of prompts select, too, as in vLLM, and in scores either way.

    Build it from keyword arguments, from a file or a shipped name with `Recipe.load`, or from a dictionary with
    `Recipe.parse`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = "unnamed"
    description: str = ""
    calibration: Calibration = Calibration()
    embeddings: Embeddings | None = None
    basis: Basis | None = None
    prefill: Literal["masked", "dense"] = "dense"
    stages: tuple[AnyStage, ...] = Field(min_length=1)
    search: Search | None = None
    tuning: Tuning | None = None

    @classmethod
    def parse(
        cls,
        data: Mapping[str, Any],
        where: str = "recipe",
        lines: Mapping[tuple[Any, ...], int] | None = None,
    ) -> Recipe:
        """Validate `data`; raises InputError with one line: file, line if known, path, what is wrong, a hint."""
        try:
            return cls.model_validate(dict(data))
        except ValidationError as error:
            raise InputError(_one_line(error, where, lines or {})) from None

    @classmethod
    def load(cls, name_or_path: str | Path) -> Recipe:
        """A recipe from a YAML file, or one of the shipped recipes by name. Raises InputError."""
        path = Path(name_or_path)
        if path.suffix not in (".yaml", ".yml"):
            named = named_recipes()
            if str(name_or_path) not in named:
                raise InputError(f"no recipe named {str(name_or_path)!r}{did_you_mean(str(name_or_path), list(named))}")
            path = named[str(name_or_path)]
        try:
            text = path.read_text(encoding="utf-8")
            root = yaml.compose(text, Loader=_Loader)
            data = yaml.load(text, Loader=_Loader)
        except FileNotFoundError:
            raise InputError(f"{path}: no such recipe file; `halfweight recipes` lists the shipped ones") from None
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: cannot be read ({error})") from None
        except (yaml.YAMLError, RecursionError) as error:
            raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
        if not isinstance(data, dict):
            raise InputError(f"{path}: a recipe is a mapping with the key `stages`")
        data.setdefault("name", path.stem)
        return cls.parse(data, str(path), dict(_node_lines(root)))

    def to_yaml(self) -> str:
        """The complete recipe, defaults written out; `Recipe.load` of this text gives an equal recipe."""
        return yaml.safe_dump(self.model_dump(mode="json", by_alias=True), sort_keys=False, width=100)

    def with_calibration(self, **changes: Any) -> Recipe:
        """A copy with the given calibration fields replaced where they are not None (flags override recipes)."""
        given = {key: value for key, value in changes.items() if value is not None}
        try:
            calibration = Calibration.model_validate({**self.calibration.model_dump(), **given})
        except ValidationError as error:
            first = error.errors()[0]
            raise InputError(f"calibration.{first['loc'][0]}: {first['msg']}, got {first['input']!r}") from None
        return self.model_copy(update={"calibration": calibration})

    def with_embeddings(self, bits: int | None) -> Recipe:
        """A copy that also rounds the embedding and the head to `bits`, where that is not None; raises InputError."""
        if bits is None:
            return self
        settings = {} if self.embeddings is None else self.embeddings.model_dump()
        try:
            embeddings = Embeddings.model_validate({**settings, "bits": bits})
        except ValidationError as error:
            raise InputError(f"embeddings.bits: {error.errors()[0]['msg']}, got {bits}") from None
        return self.model_copy(update={"embeddings": embeddings})

    def with_tuning(self, choice: str | None = None, **changes: int | None) -> Recipe:
        """A copy with the stages of tuning that `choice` names, and with `changes` where they are not None.

        A stage that is chosen and not in the recipe gets its defaults. Raises InputError for an unknown choice, and for
        `changes` (`samples`, `block_epochs`, `end_to_end_epochs`) of a stage that is off.
        """
        sections = {} if self.tuning is None else self.tuning.model_dump(exclude_none=True)
        if choice is not None:
            if choice not in CHOICES:
                raise InputError(f"--tuning {choice!r} is unknown{did_you_mean(choice, list(CHOICES))}")
            rest = {name: value for name, value in sections.items() if name not in CHOICES["both"]}
            chosen = {stage: sections.get(stage, {}) for stage in CHOICES[choice]}
            sections = {**rest, **chosen} if chosen else {}
        for name, value in changes.items():
            stage = name.removesuffix("_epochs")
            if value is None:
                continue
            if not sections or (stage != name and stage not in sections):
                needed = "both" if stage == name else stage.replace("_", "-")
                raise InputError(f"recipe {self.name}: that stage of tuning is off; add --tuning {needed}")
            sections[stage] = value if stage == name else {**sections[stage], "epochs": value}
        return self.model_copy(update={"tuning": Tuning.model_validate(sections) if sections else None})

    def with_search(self, method: str | None = None, trials: int | None = None) -> Recipe:
        """A copy that searches by `method` (`none` does not), with `trials`, where they are not None.

        A search that the recipe does not have gets the defaults. Raises InputError for an unknown method, and for
        `trials` of a search that is off.
        """
        settings = None if self.search is None else self.search.model_dump()
        if method is not None:
            if method not in SEARCHES:
                raise InputError(f"--search {method!r} is unknown{did_you_mean(method, list(SEARCHES))}")
            settings = None if method == "none" else {**(settings or {}), "method": method}
        if trials is not None:
            if settings is None:
                raise InputError(f"recipe {self.name}: does not search; add --search evolution")
            settings["trials"] = trials
        try:
            search = None if settings is None else Search.model_validate(settings)
        except ValidationError as error:
            raise InputError(f"search.trials: {error.errors()[0]['msg']}, got {trials}") from None
        return self.model_copy(update={"search": search})

    def resolve(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, StageConfig]:
        """Which stage applies to which linear of a model with `shapes` (name -> `(N, K)`).

        Raises InputError when a stage matches nothing, two stages work on one linear, a pattern does not divide an
        input size or cannot be stored, or linears that servers fuse (q/k/v, gate/up) end up with different schemes.
        """
        chosen = {
            name: _for_linear(self.stages[number], name, shapes[name], f"recipe {self.name}: stages[{number}]")
            for name, number in self.owners(shapes).items()
        }
        schemes = {name: stage.scheme(shapes[name]) for name, stage in chosen.items()}
        _check_fused(self.name, schemes, shapes)
        for name, scheme in schemes.items() if self.tuning is not None else ():
            if (fixed := _not_trained(scheme)) is not None:
                raise InputError(
                    f"recipe {self.name}: tuning: {name} has {fixed}, which tuning cannot train; remove tuning (or pass"
                    " --tuning none)"
                )
        if self.search is not None and all(stage.selection is None for stage in chosen.values()):
            raise InputError(
                f"recipe {self.name}: search: no stage has a selection, so there is nothing to search; remove search"
                " (or pass --search none)"
            )
        return chosen

    def owners(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, int]:
        """The number of the stage that works on each linear; InputError as `resolve` describes."""
        owner: dict[str, int] = {}
        for number, stage in enumerate(self.stages):
            matched = [name for name in shapes if _matches(name, stage.targets) and not _matches(name, stage.ignore)]
            where = f"recipe {self.name}: stages[{number}]"
            for pattern in stage.targets:
                if not any(_matches(name, [pattern]) for name in shapes):
                    tails = sorted({name.rpartition(".")[2] for name in shapes})
                    raise InputError(f"{where}.targets: {pattern!r} matches no linear{did_you_mean(pattern, tails)}")
            if not matched:
                raise InputError(f"{where}: ignore leaves no linear to work on")
            for name in matched:
                if name in owner:
                    raise InputError(
                        f"{where}: {name} is already compressed by stages[{owner[name]}]; narrow targets or ignore it"
                    )
                owner[name] = number
            for key in {} if stage.selection is None else stage.selection.profile:
                if not any(name == key or name.startswith(f"{key}.") for name in matched):
                    raise InputError(
                        f"{where}.selection.profile: {key!r} holds no linear of this stage; name a linear such as"
                        f" {matched[0]!r}, or a module around it"
                    )
        return owner


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads `2:4` as text (YAML 1.1: the base-60 number 124) and refuses aliases and repeated keys."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases are not supported", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_INT = "tag:yaml.org,2002:int"
_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] != _INT]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_INT, re.compile(r"[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789"))


def named_recipes() -> dict[str, Path]:
    """Shipped recipes: name -> file."""
    folder = Path(str(resources.files(__package__.rpartition(".")[0]) / "recipes"))
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def _matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether `name` matches any glob or `re:` expression; a glob without a dot is tried on the last part alone."""
    for pattern in patterns:
        if pattern.startswith("re:"):
            try:
                if re.fullmatch(pattern[3:], name):
                    return True
            except re.error as error:
                raise InputError(f"recipe: {pattern!r} is not a valid regular expression ({error})") from None
        elif fnmatchcase(name if "." in pattern else name.rpartition(".")[2], pattern):
            return True
    return False


def _for_linear(stage: StageConfig, name: str, shape: tuple[int, int], where: str) -> StageConfig:
    """`stage` with what depends on the linear filled in; raises InputError when it cannot work on it."""
    try:
        stage = stage.for_linear(name, shape)
        if stage.selection is not None:
            stage = stage.model_copy(update={"selection": stage.selection.for_linear(name)})
        scheme = stage.scheme(shape)
    except ValueError as error:
        raise InputError(f"{where}: {name}: {error}; ignore it or change the stage") from None
    nm = parse_nm(scheme.pattern)
    if nm is not None and shape[1] % nm[1]:
        raise InputError(
            f"{where}.pattern: {scheme.pattern} needs an input size divisible by {nm[1]}, but {name} has {shape[1]};"
            " ignore it or choose another pattern"
        )
    try:
        tensor_specs(scheme, shape)
    except FormatError as error:
        raise InputError(f"{where}: {name}: {error}; ignore it or change the stage") from None
    return stage


def _not_trained(scheme: LinearScheme) -> str | None:
    """What `scheme` has that tuning cannot train, in words; None when it can train all of it."""
    if scheme.prompt_static:
        return "inputs that a prompt chooses"
    if scheme.selection is not None and scheme.low_rank is not None:
        return "a branch for the inputs that are not read"
    return "integers along the outputs" if scheme.input_major and scheme.integers is not None else None


def _check_fused(recipe: str, schemes: Mapping[str, LinearScheme], shapes: Iterable[str]) -> None:
    siblings: dict[tuple[str, tuple[str, ...]], set[LinearScheme | None]] = {}
    for name in shapes:
        parent, _, tail = name.rpartition(".")
        for group in FUSED:
            if tail in group:
                scheme = schemes.get(name)
                if scheme is not None and (scheme.balance == "layer" or parse_output_group(scheme.pattern)):
                    # How many groups a whole layer, or an input, keeps grows with the rows; fused ones keep their sum.
                    scheme = scheme.model_copy(update={"kept": None, "density": 1.0})
                if scheme is not None and scheme.selection is not None:
                    scheme = scheme.model_copy(update={"low_rank": None})  # small ranks may even round to none
                if scheme is not None and scheme.low_rank is not None:
                    # Ranks follow the rows too; the fused branch takes the largest, and zeros for the others.
                    branch = scheme.low_rank.model_copy(update={"rank": 1})
                    scheme = scheme.model_copy(update={"low_rank": branch})
                siblings.setdefault((parent, group), set()).add(scheme)
    for (parent, group), found in siblings.items():
        if len(found) > 1:
            raise InputError(
                f"recipe {recipe}: {parent}: {', '.join(group)} are fused by servers and must share one scheme;"
                " target or ignore them together"
            )


def _node_lines(node: yaml.Node | None, path: tuple[Any, ...] = ()) -> Iterable[tuple[tuple[Any, ...], int]]:
    """(path, line number from 1) of every key and item below a YAML node."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield (*path, key.value), key.start_mark.line + 1
            yield from _node_lines(value, (*path, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield (*path, index), item.start_mark.line + 1
            yield from _node_lines(item, (*path, index))


def _one_line(error: ValidationError, where: str, lines: Mapping[tuple[Any, ...], int]) -> str:
    """The first validation error as `file:line: path: what; suggestion`."""
    first = error.errors()[0]
    location = list(first["loc"])
    fields: Mapping[str, Any] = Recipe.model_fields
    if location[:1] == ["stages"] and len(location) > 2 and location[2] in PASSES:
        # pydantic names the union's branch in the path; the user's file does not.
        fields = PASSES[str(location.pop(2))].config.model_fields
    elif location[:1] == ["calibration"]:
        fields = Calibration.model_fields
    elif location[:1] == ["embeddings"]:
        fields = Embeddings.model_fields
    elif location[:1] == ["basis"]:
        fields = Basis.model_fields
    elif location[:1] == ["search"]:
        fields = Search.model_fields
    elif location[:1] == ["tuning"]:
        fields = tuning_fields([str(part) for part in location[1:-1]])
    shown = reduce(lambda text, part: f"{text}[{part}]" if isinstance(part, int) else f"{text}.{part}", location, "")
    shown = shown.encode("unicode_escape").decode()
    key = str(location[-1]) if location else ""
    if first["type"] == "extra_forbidden":
        options = [info.alias or name for name, info in fields.items()]
        message = f"unknown key{did_you_mean(key, options)}"
    elif first["type"] == "union_tag_invalid":
        message = f"unknown pass {first['ctx']['tag']!r}{did_you_mean(str(first['ctx']['tag']), list(PASSES))}"
        shown += ".pass"
        location.append("pass")
    elif first["type"] == "union_tag_not_found":
        message = f"a stage needs the key `pass`; choose from {', '.join(sorted(PASSES))}"
    else:
        got = "" if first["type"] == "value_error" else f", got {first['input']!r}"
        message = first["msg"].removeprefix("Value error, ") + got
    line = next(
        (lines[tuple(location[:n])] for n in range(len(location), 0, -1) if tuple(location[:n]) in lines),
        None,
    )
    return f"{where}{f':{line}' if line else ''}: {shown.lstrip('.') or 'recipe'}: {message}"
