"""Recipes: what ships loads, what is written reads back, and every mistake is one line that says what to do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from halfweight import InputError, Recipe
from halfweight.compress.recipe import named_recipes
from recipe_cases import PRUNERS, SHAPES, WHERE, failure, one_line, stages, write

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
