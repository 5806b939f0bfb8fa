"""Recipes: what ships loads, what is written reads back, and every mistake is one line that says what to do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from halfweight import InputError, Recipe
from halfweight.compress.recipe import Calibration, Embeddings, named_recipes

MLP = {"gate_proj": (64, 32), "up_proj": (64, 32), "down_proj": (32, 64)}
ATTENTION = {"q_proj": (32, 32), "k_proj": (16, 32), "v_proj": (16, 32), "o_proj": (32, 32)}
SHAPES = {
    **{f"model.layers.{i}.self_attn.{name}": shape for i in range(12) for name, shape in ATTENTION.items()},
    **{f"model.layers.{i}.mlp.{name}": shape for i in range(12) for name, shape in MLP.items()},
}
WHERE = "<file>"
PRUNERS = ["magnitude", "wanda", "sparsegpt", "admm"]


def write(folder: Path, text: str) -> Path:
    file = folder / "mine.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def stages(*given: dict[str, Any], **calibration: Any) -> Recipe:
    return Recipe.parse({"name": "mine", "calibration": calibration, "stages": list(given)})


def failure(folder: Path, text: str) -> str:
    """The one line that loading `text` fails with; the file is shown as WHERE."""
    file = write(folder, text)
    with pytest.raises(InputError) as error:
        Recipe.load(file)
    return one_line(error.value).replace(str(file), WHERE)


def refusal(recipe: Recipe, shapes: dict[str, tuple[int, int]] = SHAPES) -> str:
    """The one line that resolving `recipe` fails with."""
    with pytest.raises(InputError) as error:
        recipe.resolve(shapes)
    return one_line(error.value)


def one_line(error: BaseException) -> str:
    text = str(error)
    assert text.strip() == text
    assert text.isprintable(), text  # no line breaks, no control characters
    assert "pydantic" not in text
    return text


# --- what ships ------------------------------------------------------------------------------------------------


def test_recipes_ship() -> None:
    assert {f"2of4-{name}" for name in PRUNERS} <= set(named_recipes())


@pytest.mark.parametrize("name", named_recipes())
def test_shipped_recipes_load_and_apply(name: str) -> None:
    recipe = Recipe.load(name)
    assert recipe.name == name
    assert recipe.description
    assert recipe == Recipe.load(named_recipes()[name])
    assert set(recipe.resolve(SHAPES)) == set(SHAPES)


@pytest.mark.parametrize("name", PRUNERS)
def test_named_methods_run_the_pass_they_are_named_after(name: str) -> None:
    (stage,) = Recipe.load(f"2of4-{name}").stages
    assert stage.name == name
    assert stage.scheme((8, 8)).pattern == "2:4"
    assert stage.scheme((8, 8)).density == 0.5


# --- round trips -----------------------------------------------------------------------------------------------


ROUND_TRIPS = [
    *[stages({"pass": name}) for name in (*PRUNERS, "rtn", "gptq")],
    stages({"pass": "gqsa", "pattern": "2:4", "group_size": 32}),
    stages({"pass": "gqsa", "pattern": "1x16", "density": 0.7, "mask": "obs", "segments": 2}),
    stages({"pass": "gqsa", "pattern": "1x8", "density": 0.2, "balance": "layer", "symmetric": True}),
    stages({"pass": "wanda", "pattern": "unstructured", "density": 0.1, "scope": "layer"}),
    stages(
        {"pass": "admm", "iterations": 7, "ramp": 3, "penalty": 1e-5, "refine": 0, "damping": 1e-9},
        data="texts/mein text.jsonl.gz",
        samples=1,
        seqlen=2,
        seed=2**40,
    ),
    stages(
        {"pass": "sparsegpt", "pattern": "4:8", "block_size": 64, "targets": ["re:.*[kv]_proj", "*.0.mlp.*"]},
        {"pass": "magnitude", "pattern": "1:4", "targets": ["down_proj"], "ignore": ["re:a: b # c", "'\"", "ü"]},
    ),
    Recipe.parse({"name": "no", "description": "a: b\n# 1.0 'x' \"y\" ü ", "stages": [{"pass": "wanda"}]}),
    Recipe.parse({"name": "2024-01-01", "description": "x" * 300, "stages": [{"pass": "wanda"}]}),
]


@pytest.mark.parametrize("recipe", ROUND_TRIPS, ids=range(len(ROUND_TRIPS)))
def test_what_is_written_reads_back_equal(recipe: Recipe, tmp_path: Path) -> None:
    again = Recipe.load(write(tmp_path, recipe.to_yaml()))
    assert again == recipe
    assert again.to_yaml() == recipe.to_yaml()


def test_written_recipes_spell_out_defaults() -> None:
    data = yaml.safe_load(stages({"pass": "sparsegpt"}).to_yaml())
    assert data["calibration"] == {"data": "builtin", "samples": 32, "seqlen": 1024, "seed": 0}
    assert data["stages"][0] == {
        "targets": ["*"],
        "ignore": [],
        "low_rank": None,
        "selection": None,
        "pattern": "2:4",
        "density": None,
        "scope": "row",
        "pass": "sparsegpt",
        "block_size": 128,
        "damping": 0.01,
        "refine": 4,
    }


def test_files_without_a_name_are_named_after_the_file(tmp_path: Path) -> None:
    assert Recipe.load(write(tmp_path, "stages: [{pass: wanda}]")).name == "mine"
    assert Recipe.load(write(tmp_path, "name: other\nstages: [{pass: wanda}]")).name == "other"


def test_paths_may_be_strings_and_end_in_yml(tmp_path: Path) -> None:
    file = tmp_path / "short.yml"
    file.write_text("stages: [{pass: wanda}]")
    assert Recipe.load(str(file)) == Recipe.load(file)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "8:16", "16:64"])
def test_patterns_need_no_quotes(pattern: str, tmp_path: Path) -> None:
    # YAML 1.1 reads 2:4 as the base-60 number 124.
    recipe = Recipe.load(write(tmp_path, f"stages:\n  - pass: wanda\n    pattern: {pattern}\n"))
    assert recipe.stages[0].pattern == pattern


def test_numbers_in_scientific_notation_are_numbers(tmp_path: Path) -> None:
    recipe = Recipe.load(write(tmp_path, "stages: [{pass: sparsegpt, damping: 1e-3}]"))
    assert recipe.stages[0].damping == 1e-3


# --- mistakes in a file ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # Unknown keys, at each level.
        ("stage: 1\nstages: [{pass: wanda}]", ":1: stage: unknown key; did you mean 'stages'?"),
        ("stages:\n- pass: wanda\n\nqqq: 1", ":4: qqq: unknown key; choose from "),
        (
            "calibration:\n  samples: 3\n  tokens: 8\nstages: [{pass: wanda}]",
            ":3: calibration.tokens: unknown key; choose from data, samples, seed, seqlen",
        ),
        (
            "calibration:\n  sample: 3\nstages: [{pass: wanda}]",
            ":2: calibration.sample: unknown key; did you mean 'samples'?",
        ),
        (
            "stages:\n  - pass: wanda\n  - pass: wanda\n    target: [x]\n",
            ":4: stages[1].target: unknown key; did you mean 'targets'?",
        ),
        (
            "stages:\n  - pass: sparsegpt\n    blocksize: 8\n",
            ":3: stages[0].blocksize: unknown key; did you mean 'block_size'?",
        ),
        ("stages:\n  - pass: wanda\n    block_size: 8\n", ":3: stages[0].block_size: unknown key; choose from "),
        # Wrong types and values.
        ("stages: [{pass: wanda}]\nname: [1]", ":2: name: Input should be a valid string, got [1]"),
        (
            "calibration:\n  samples: many\nstages: [{pass: wanda}]",
            ":2: calibration.samples: Input should be a valid integer",
        ),
        ("calibration:\n  samples: 0\nstages: [{pass: wanda}]", ":2: calibration.samples: Input should be greater"),
        ("calibration: 3\nstages: [{pass: wanda}]", ":1: calibration: Input should be a valid dictionary"),
        ("stages:\n  - pass: wanda\n    targets: down_proj\n", ":3: stages[0].targets: Input should be a valid"),
        ("stages:\n  - pass: wanda\n    targets:\n    - a\n    - 3\n", ":5: stages[0].targets[1]: Input should be"),
        ("stages:\n  - pass: sparsegpt\n    damping: 2\n", ":3: stages[0].damping: Input should be less than 1, got 2"),
        ("stages:\n  - wanda\n", ":2: stages[0]: "),
        ("stages: wanda\n", ":1: stages: Input should be a valid"),
        # Passes.
        ("stages:\n  - pass: wander\n", ":2: stages[0].pass: unknown pass 'wander'; did you mean 'wanda'?"),
        (
            "stages:\n  - targets: [x]\n    pass: awq\n",
            ":3: stages[0].pass: unknown pass 'awq'; choose from admm, gptq, gqsa, keep, magnitude, rtn,"
            " sparsegpt, wanda",
        ),
        ("stages:\n  - pass: [wanda]\n", ":2: stages[0].pass: unknown pass"),
        (
            'stages:\n  - pass: wanda\n  - pattern: "2:4"\n',
            ":3: stages[1]: a stage needs the key `pass`; choose from admm, gptq, gqsa, keep, magnitude, rtn,"
            " sparsegpt, wanda",
        ),
        # Patterns.
        (
            "stages:\n  - pass: wanda\n    pattern: 2of4\n",
            ":3: stages[0].pattern: unknown pattern '2of4'; use N:M such as 2:4, or unstructured",
        ),
        ('stages:\n  - pass: admm\n    pattern: "4:4"\n', ":3: stages[0].pattern: pattern '4:4' keeps 4 of every 4"),
        ('stages:\n  - pass: admm\n    pattern: "0:4"\n', ":3: stages[0].pattern: pattern '0:4' keeps 0 of every 4"),
        (
            "stages:\n  - pass: wanda\n    pattern: unstructured\n",
            ":2: stages[0]: pattern unstructured needs a density, such as 0.5",
        ),
        ("stages:\n  - pass: wanda\n    density: 0.5\n", ":2: stages[0]: pattern 2:4 fixes density and scope"),
        ("stages:\n  - pass: wanda\n    scope: layer\n", ":2: stages[0]: pattern 2:4 fixes density and scope"),
        (
            "stages:\n  - pass: sparsegpt\n    block_size: 6\n",
            ":2: stages[0]: block_size 6 is not a multiple of the 4 of pattern 2:4",
        ),
        ("stages:\n  - pass: admm\n    ramp: 30\n", ":2: stages[0]: ramp 30 is longer than the 20 iterations"),
        # Nothing to do.
        ("stages: []\n", ":1: stages: "),
        ("description: nothing\n", ": stages: "),
    ],
)
def test_mistakes_are_located_and_explained(text: str, expected: str, tmp_path: Path) -> None:
    assert failure(tmp_path, text).startswith(WHERE + expected)


@pytest.mark.parametrize("text", ["", "# nothing\n", "- pass: wanda\n", "wanda\n", "3\n"])
def test_files_that_are_no_mapping_are_refused(text: str, tmp_path: Path) -> None:
    assert failure(tmp_path, text) == f"{WHERE}: a recipe is a mapping with the key `stages`"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("stages:\n  - pass: wanda\n  }", 3),
        ("stages: [\n", 2),
        ("\tstages: 1", 1),
        ("a: b: c", 1),
        ("a: 1\n---\nb: 2\n", 2),
        ("stages: !!python/object:os.system {}\n", 1),
        ("stages: *nothing\n", 1),
        ("? [1, 2]\n: {}\n", 1),
    ],
)
def test_broken_yaml_is_located(text: str, line: int, tmp_path: Path) -> None:
    message = failure(tmp_path, text)
    assert message.startswith(f"{WHERE}: not valid YAML: ")
    assert f"line {line}," in message


@pytest.mark.parametrize("text", ['"a\\nb": 1\nstages: [{pass: wanda}]', "1: 2\nstages: [{pass: wanda}]"])
def test_odd_keys_are_refused_in_one_line(text: str, tmp_path: Path) -> None:
    assert failure(tmp_path, text).startswith(WHERE)


@pytest.mark.parametrize("text", ["stages: &a [*a]\n", "stages: &a\n  - targets: *a\n"])
def test_recursive_yaml_is_refused(text: str, tmp_path: Path) -> None:
    assert failure(tmp_path, text).startswith(WHERE)


def test_keys_given_twice_are_refused(tmp_path: Path) -> None:
    text = 'stages:\n  - pass: wanda\n    pattern: "2:4"\n    pattern: "1:4"\n'
    assert "pattern" in failure(tmp_path, text)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    missing, folder = tmp_path / "missing.yaml", tmp_path / "folder.yaml"
    folder.mkdir()
    for path, reason in ((missing, "no such recipe file"), (folder, "cannot be read")):
        with pytest.raises(InputError) as error:
            Recipe.load(path)
        assert one_line(error.value).startswith(f"{path}: {reason}")


def test_binary_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "binary.yaml"
    file.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(InputError) as error:
        Recipe.load(file)
    assert one_line(error.value).startswith(f"{file}: cannot be read")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("2of4-wnda", "no recipe named '2of4-wnda'; did you mean '2of4-wanda'?"),
        ("qqq", "no recipe named 'qqq'; choose from "),
        ("recipes/2of4-admm", "no recipe named 'recipes/2of4-admm'; did you mean '2of4-admm'?"),
    ],
)
def test_unknown_names_suggest_shipped_ones(name: str, expected: str) -> None:
    with pytest.raises(InputError, match="^" + re.escape(expected)) as error:
        Recipe.load(name)
    one_line(error.value)


def test_dictionaries_are_checked_like_files() -> None:
    with pytest.raises(InputError) as error:
        Recipe.parse({"stages": [{"pass": "wanda", "ignored": []}]})
    assert one_line(error.value) == "recipe: stages[0].ignored: unknown key; did you mean 'ignore'?"


# --- which stage applies to what -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*", r".*"),
        ("down_proj", r".*\.down_proj"),
        ("d*_proj", r".*\.down_proj"),
        ("[do]*_proj", r".*\.(down|o)_proj"),
        ("*.down_proj", r".*\.down_proj"),
        ("model.layers.1.*", r"model\.layers\.1\..*"),  # the dot after 1 keeps 10 and 11 out
        ("*.mlp.*", r".*\.mlp\..*"),
        ("*.layers.?.self_attn.*", r"model\.layers\.\d\.self_attn\..*"),
        ("model.layers.3.mlp.*", r"model\.layers\.3\.mlp\..*"),
        (r"re:model\.layers\.(3|11)\..*", r"model\.layers\.(3|11)\..*"),
        ("re:.*_proj", r".*"),
    ],
)
def test_targets_select_by_glob_or_expression(pattern: str, expected: str) -> None:
    wanted = {name for name in SHAPES if re.fullmatch(expected, name)}
    assert wanted
    assert set(stages({"pass": "wanda", "targets": [pattern]}).resolve(SHAPES)) == wanted


@pytest.mark.parametrize("pattern", ["proj", "Down_proj", "layers.0", "mlp", "re:down_proj", "re:layers", "re:"])
def test_patterns_match_whole_names_only(pattern: str) -> None:
    message = refusal(stages({"pass": "wanda", "targets": [pattern]}))
    assert message.startswith(f"recipe mine: stages[0].targets: {pattern!r} matches no linear")


def test_ignore_takes_away_from_targets() -> None:
    recipe = stages({"pass": "wanda", "ignore": ["o_proj", "re:.*down_proj", "model.layers.0.*", "absent"]})
    chosen = recipe.resolve(SHAPES)
    kept = {n for n in SHAPES if not n.endswith(("o_proj", "down_proj")) and not n.startswith("model.layers.0.")}
    assert set(chosen) == kept
    assert set(chosen.values()) == {recipe.stages[0]}


def test_stages_divide_the_model() -> None:
    recipe = stages(
        {"pass": "wanda", "targets": ["*.mlp.*"]},
        {"pass": "sparsegpt", "targets": ["*.self_attn.*"], "ignore": ["o_proj"]},
    )
    chosen = recipe.resolve(SHAPES)
    assert chosen["model.layers.5.mlp.up_proj"].name == "wanda"
    assert chosen["model.layers.5.self_attn.q_proj"].name == "sparsegpt"
    assert "model.layers.5.self_attn.o_proj" not in chosen


def test_targets_that_match_nothing_are_refused() -> None:
    message = refusal(stages({"pass": "wanda"}, {"pass": "wanda", "targets": ["o_proj", "dwn_proj"]}))
    assert message == "recipe mine: stages[1].targets: 'dwn_proj' matches no linear; did you mean 'down_proj'?"


def test_ignoring_everything_is_refused() -> None:
    message = refusal(stages({"pass": "wanda", "targets": ["*.mlp.*"], "ignore": ["re:.*"]}))
    assert message == "recipe mine: stages[0]: ignore leaves no linear to work on"


def test_pruning_a_linear_twice_is_refused() -> None:
    message = refusal(stages({"pass": "wanda", "targets": ["*.mlp.*"]}, {"pass": "magnitude", "targets": ["*_proj"]}))
    assert re.fullmatch(
        r"recipe mine: stages\[1\]: model\.layers\.0\.mlp\.\w+ is already compressed by stages\[0\];"
        r" narrow targets or ignore it",
        message,
    )


@pytest.mark.parametrize(("pattern", "size", "divisor"), [("2:4", 34, 4), ("4:8", 36, 8), ("1:3", 32, 3)])
def test_input_sizes_must_hold_whole_groups(pattern: str, size: int, divisor: int) -> None:
    shapes = {"a.up_proj": (8, divisor * 4), "a.down_proj": (size, divisor * 4), "b.down_proj": (8, size)}
    message = refusal(stages({"pass": "wanda", "pattern": pattern}), shapes)
    assert message == (
        f"recipe mine: stages[0].pattern: {pattern} needs an input size divisible by {divisor}, but b.down_proj has"
        f" {size}; ignore it or choose another pattern"
    )
    stages({"pass": "wanda", "pattern": pattern, "ignore": ["b.*"]}).resolve(shapes)
    stages({"pass": "wanda", "pattern": "unstructured", "density": 0.5}).resolve(shapes)


@pytest.mark.parametrize(
    ("given", "parent", "names"),
    [
        ([{"targets": ["q_proj"]}], "model.layers.0.self_attn", "q_proj, k_proj, v_proj"),
        ([{"ignore": ["model.layers.7.mlp.up_proj"]}], "model.layers.7.mlp", "gate_proj, up_proj"),
        (
            [{"targets": ["up_proj", "*.self_attn.*"]}, {"targets": ["gate_proj"], "pattern": "1:4"}],
            "model.layers.0.mlp",
            "gate_proj, up_proj",
        ),
    ],
)
def test_fused_siblings_need_one_scheme(given: list[dict[str, Any]], parent: str, names: str) -> None:
    message = refusal(stages(*[{"pass": "wanda", **stage} for stage in given]))
    assert message.startswith(f"recipe mine: {parent}: {names} are fused by servers and must share one scheme")


def test_fused_siblings_may_come_from_different_passes() -> None:
    recipe = stages({"pass": "wanda", "targets": ["q_proj"]}, {"pass": "admm", "targets": ["[kv]_proj"]})
    chosen = recipe.resolve(SHAPES)
    assert {stage.scheme((8, 8)) for stage in chosen.values()} == {recipe.stages[0].scheme((8, 8))}
    assert len(chosen) == 36


@pytest.mark.parametrize("key", ["targets", "ignore"])
@pytest.mark.parametrize("pattern", ["re:(", "re:*", "re:[a"])
def test_invalid_expressions_are_located(pattern: str, key: str, tmp_path: Path) -> None:
    file = write(tmp_path, f"stages:\n  - pass: wanda\n    {key}:\n    - '{pattern}'\n")
    with pytest.raises(InputError) as error:
        Recipe.load(file).resolve(SHAPES)
    message = one_line(error.value)
    assert f"{pattern!r} is not a valid regular expression" in message
    assert f"stages[0].{key}" in message


# --- calibration -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{}, {"seed": 0}, {"samples": 1}, {"data": "self", "seqlen": 16}, {"samples": None, "seed": 5}]
)
def test_flags_override_only_what_they_give(changes: dict[str, Any]) -> None:
    recipe = stages({"pass": "wanda"}, data="a.txt", samples=7, seqlen=99, seed=3)
    changed = recipe.with_calibration(**changes)
    given = {key: value for key, value in changes.items() if value is not None}
    assert changed.calibration == Calibration(**{"data": "a.txt", "samples": 7, "seqlen": 99, "seed": 3, **given})
    assert changed.model_copy(update={"calibration": recipe.calibration}) == recipe
    assert recipe.calibration.samples == 7


def test_the_embeddings_flag_changes_only_their_bits() -> None:
    plain = stages({"pass": "wanda"})
    assert plain.with_embeddings(None) == plain
    rounded = plain.with_embeddings(8)
    assert rounded.embeddings == Embeddings(bits=8)
    settings = rounded.model_copy(update={"embeddings": Embeddings(bits=8, group_size=32)}).with_embeddings(4)
    assert settings.embeddings == Embeddings(bits=4, group_size=32)
    with pytest.raises(InputError) as error:
        plain.with_embeddings(5)
    assert "embeddings.bits" in one_line(error.value)


@pytest.mark.parametrize("changes", [{"samples": 0}, {"seqlen": 1}, {"seed": -1}, {"sample": 3}])
def test_bad_overrides_are_one_line(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError) as error:
        stages({"pass": "wanda"}).with_calibration(**changes)
    assert f"calibration.{next(iter(changes))}" in one_line(error.value)
