"""Which stage of a recipe applies to which linear, and flags that override a recipe."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from halfweight import InputError, Recipe
from halfweight.compress.recipe import Calibration, Embeddings
from recipe_cases import SHAPES, one_line, refusal, stages, write

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
