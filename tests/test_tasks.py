"""The lm-eval bridge on tiny models and local data: its numbers, its files, resuming, and what bad input gets."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import halfweight
from commands import Cli, ok, one_line, read
from halfweight import InputError
from tiny import WORDS

pytest.importorskip("lm_eval")

from halfweight.eval import tasks
from halfweight.eval.significance import mcnemar
from halfweight.eval.task_results import document_scores, task_results

CHOICE = """
task: pairs
dataset_path: json
dataset_kwargs: {data_files: {validation: pairs.jsonl}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{goal}}"
doc_to_target: label
doc_to_choice: "{{[sol1, sol2]}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.0}
"""

GENERATION = """
task: continue
dataset_path: json
dataset_kwargs: {data_files: {test: pairs.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{goal}}"
doc_to_target: "{{sol1}}"
generation_kwargs: {max_gen_toks: 4, until: ["</s>"], do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.0}
"""


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a multiple-choice and a generation task over one JSON-lines file of 12 documents."""
    folder = tmp_path_factory.mktemp("tasks")
    words = WORDS.split()
    picks = torch.randint(0, len(words), (12, 8), generator=torch.Generator().manual_seed(1)).tolist()
    lines = []
    for number, row in enumerate(picks):
        goal, first, second = (" ".join(words[i] for i in part) for part in (row[:4], row[4:6], row[6:]))
        lines.append(json.dumps({"goal": goal, "sol1": first, "sol2": second, "label": number % 2}))
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "pairs.yaml").write_text(CHOICE)
    (folder / "continue.yaml").write_text(GENERATION)
    return folder


def choice_accuracy(model: Path, folder: Path) -> float:
    """Accuracy of the multiple-choice task, straight from the model's logits."""
    network, tokenizer = halfweight.load(model), halfweight.load_tokenizer(model)
    hits = 0
    documents = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    for document in documents:
        scores = []
        for option in (document["sol1"], document["sol2"]):
            context = tokenizer(document["goal"])["input_ids"]
            ids = tokenizer(f"{document['goal']} {option}", return_tensors="pt")["input_ids"]
            with torch.no_grad():
                scored = network(ids).logits[0].log_softmax(-1)
            scores.append(sum(float(scored[i - 1, ids[0, i]]) for i in range(len(context), ids.shape[1])))
        hits += int(scores[1] > scores[0]) == document["label"]
    return hits / len(documents)


def test_scores_a_compressed_model_from_local_files(compressed: Path, local: Path, tmp_path: Path) -> None:
    specs = [str(local / "pairs.yaml"), str(local / "continue.yaml")]
    report = tasks.evaluate_tasks(compressed, specs, tmp_path, batch_size=4)
    choice, generation = report.tasks
    (accuracy,) = choice.metrics
    assert (choice.task, accuracy.name, choice.documents) == ("pairs", "acc", 12)
    assert accuracy.value == pytest.approx(choice_accuracy(compressed, local))
    assert accuracy.standard_error is not None
    assert accuracy.standard_error == pytest.approx(math.sqrt(accuracy.value * (1 - accuracy.value) / 11))
    assert choice.calibration is not None
    assert choice.calibration.accuracy == pytest.approx(accuracy.value)
    assert 0 <= choice.calibration.error <= 1
    assert [metric.name for metric in generation.metrics] == ["exact_match"]
    assert generation.calibration is None

    assert read(tmp_path / "results.json") == json.loads(report.model_dump_json())
    own = read(tmp_path / "pairs.json")
    assert own["results"]["pairs"]["acc,none"] == accuracy.value
    assert len(own["samples"]["pairs"]) == 12
    scores = document_scores(tmp_path / "pairs.json", "pairs")["acc"]
    assert sum(scores.values()) / 12 == pytest.approx(accuracy.value)

    # The same command again has nothing to do; another limit is another result.
    again = tasks.evaluate_tasks(compressed, specs, tmp_path, batch_size=4)
    assert again.resumed == sorted(specs)
    assert again.tasks == report.tasks
    fewer = tasks.evaluate_tasks(compressed, specs[:1], tmp_path, limit=3)
    assert fewer.resumed == []
    assert fewer.tasks[0].documents == 3
    assert fewer.tasks[0].available == 12


def test_an_interrupted_run_keeps_what_it_finished(llama: Path, local: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop_at_second(done: int, total: int, task: str) -> None:
        if done == 1:
            raise Stop

    specs = [str(local / "pairs.yaml"), str(local / "continue.yaml")]
    with pytest.raises(Stop):
        tasks.evaluate_tasks(llama, specs, tmp_path, limit=4, progress=stop_at_second)
    assert not (tmp_path / "results.json").exists()
    seen: list[str] = []
    report = tasks.evaluate_tasks(llama, specs, tmp_path, limit=4, progress=lambda d, t, task: seen.append(task))
    assert report.resumed == specs[:1]
    assert seen == [specs[1], ""]
    assert [result.task for result in report.tasks] == ["pairs", "continue"]


def test_quantized_embeddings_are_scored_too(llama: Path, local: Path, text_file: Path, tmp_path: Path) -> None:
    recipe = {
        "calibration": {"data": str(text_file), "samples": 2, "seqlen": 16},
        "embeddings": {"bits": 8, "group_size": 16},
        "stages": [{"pass": "rtn", "group_size": 16}],
    }
    halfweight.compress_checkpoint(llama, halfweight.Recipe.parse(recipe), tmp_path / "model")
    report = tasks.evaluate_tasks(tmp_path / "model", [str(local / "pairs.yaml")], tmp_path / "out", batch_size="auto")
    assert report.tasks[0].metrics[0].value == pytest.approx(choice_accuracy(tmp_path / "model", local))


def test_damaged_results_are_computed_again(llama: Path, local: Path, tmp_path: Path) -> None:
    (tmp_path / "pairs.json").write_text("{")
    report = tasks.evaluate_tasks(llama, [str(local / "pairs.yaml")], tmp_path, limit=2)
    assert report.resumed == []


def test_command_line(llama: Path, local: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--limit", 4, "--batch-size", 2, "--num-fewshot", 1, "--json", "tasks-report.json"]
    result = ok(cli("eval", llama, "--tasks", local / "pairs.yaml", *flags))
    report = read(tmp_path / "tasks-report.json")
    assert report == read(tmp_path / f"{llama.name}-tasks" / "results.json")
    assert (report["tasks"][0]["shots"], report["limit"], report["batch_size"]) == (1, 4.0, "2")
    assert "pairs" in result.out
    assert "acc" in result.out


@pytest.fixture
def few_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval's own PIQA, and no more: its whole index takes ten seconds to read."""
    import lm_eval.tasks

    piqa = Path(lm_eval.tasks.__file__).parent / "piqa"
    manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=piqa)
    monkeypatch.setattr(tasks, "task_manager", lambda defaults: manager)


def test_unknown_tasks_and_files_are_one_line(
    llama: Path, local: Path, tmp_path: Path, cli: Cli, few_tasks: None
) -> None:
    assert "did you mean 'piqa'?" in one_line(cli("eval", llama, "--tasks", "pica"))
    assert "lm_eval ls tasks" in one_line(cli("eval", llama, "--tasks", "zzzzqqqq"))
    assert "no such task file" in one_line(cli("eval", llama, "--tasks", tmp_path / "none.yaml"))
    (tmp_path / "list.yaml").write_text("- a\n")
    assert "needs the key `task`" in one_line(cli("eval", llama, "--tasks", tmp_path / "list.yaml"))
    (tmp_path / "broken.yaml").write_text("task: [")
    assert "not readable as YAML" in one_line(cli("eval", llama, "--tasks", tmp_path / "broken.yaml"))
    (tmp_path / "lost.yaml").write_text(CHOICE)
    assert "pairs.jsonl: no such file" in one_line(cli("eval", llama, "--tasks", tmp_path / "lost.yaml"))
    bad = tmp_path / "bad.yaml"
    bad.write_text(CHOICE.replace("pairs.jsonl", str(local / "pairs.jsonl")).replace("validation_split", "no_split"))
    assert "check its fields" in one_line(cli("eval", llama, "--tasks", bad))
    assert "not both" in one_line(cli("eval", llama, "--tasks", "piqa", "--windows", 2))


def test_missing_hub_data_says_what_to_download(llama: Path, tmp_path: Path, few_tasks: None) -> None:
    with pytest.raises(InputError, match=r"download the dataset baber/piqa into HF_HOME") as caught:
        tasks.evaluate_tasks(llama, ["piqa"], tmp_path)
    assert "\n" not in str(caught.value)


def test_a_model_that_does_not_fit_is_refused(
    llama: Path, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from halfweight.eval import fit

    class Full:
        available = 1000

    monkeypatch.setattr(fit.psutil, "virtual_memory", Full)
    with pytest.raises(InputError, match=r"0\.0 GB free; use another --device"):
        tasks.evaluate_tasks(llama, [str(local / "pairs.yaml")], tmp_path)


def test_a_group_keeps_its_members_and_skips_empty_rows(tmp_path: Path) -> None:
    saved: dict[str, Any] = {
        "results": {
            "all": {"alias": "all"},
            "one": {"alias": "one", "acc,none": 0.5, "acc_stderr,none": "N/A", "exact_match,strict": 0.25},
        },
        "n-samples": {"one": {"original": 10, "effective": 4}},
        "higher_is_better": {"one": {"acc": True}},
    }
    (result,) = task_results(saved, tmp_path / "all.json")
    assert [(metric.name, metric.value) for metric in result.metrics] == [("acc", 0.5), ("exact_match (strict)", 0.25)]
    assert result.metrics[0].standard_error is None
    assert (result.documents, result.available, result.file) == (4, 10, "all.json")


LAUNCHED = """
import sys
from halfweight.eval.tasks import evaluate_tasks
evaluate_tasks(sys.argv[1], [sys.argv[2]], sys.argv[3])
"""


@pytest.mark.slow
def test_processes_share_the_documents(llama: Path, local: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # What `accelerate launch` and torchrun set for each process.
    env = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    env |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HALFWEIGHT_BACKEND": "reference"}
    command = [sys.executable, "-c", LAUNCHED, str(llama), str(local / "pairs.yaml"), str(tmp_path / "two")]
    both = [
        subprocess.Popen(command, env={**env, "RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE, text=True)
        for rank in ("0", "1")
    ]
    for process in both:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors[-3000:]
    alone = tasks.evaluate_tasks(llama, [str(local / "pairs.yaml")], tmp_path / "one")
    report = read(tmp_path / "two" / "results.json")
    assert report["processes"] == 2
    assert report["tasks"][0]["documents"] == 12
    assert report["tasks"][0]["metrics"][0]["value"] == pytest.approx(alone.tasks[0].metrics[0].value)
    assert document_scores(tmp_path / "two" / "pairs.json", "pairs") == document_scores(
        tmp_path / "one" / "pairs.json", "pairs"
    )


def test_the_documented_piqa_task_runs(llama: Path, tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[1]
    page = (root / "docs" / "evaluation.md").read_text(encoding="utf-8")
    (tmp_path / "piqa_local.yaml").write_text(page.split("```yaml\n")[1].split("```")[0])
    data = root.parent / "shared" / "data"
    if (data / "piqa-valid.jsonl").is_file():
        questions = (data / "piqa-valid.jsonl").read_text(encoding="utf-8").splitlines()[:8]
        answers = (data / "piqa-valid-labels.txt").read_text(encoding="utf-8").split()[:8]
    else:
        questions = [json.dumps({"goal": "the of", "sol1": "and to", "sol2": "in a"})] * 8
        answers = ["0", "1"] * 4
    documents = [json.loads(q) | {"label": int(a)} for q, a in zip(questions, answers, strict=True)]
    (tmp_path / "piqa.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    report = tasks.evaluate_tasks(llama, [str(tmp_path / "piqa_local.yaml")], tmp_path / "out", batch_size=8)
    (result,) = report.tasks
    assert (result.task, result.documents) == ("piqa_local", 8)
    assert [metric.name for metric in result.metrics] == ["acc", "acc_norm"]
    assert result.calibration is not None


def test_compare_pairs_the_documents(
    llama: Path, compressed: Path, local: Path, text_file: Path, tmp_path: Path, cli: Cli
) -> None:
    text = ["--text", text_file, "--windows", 2, "--seqlen", 64, "--new-tokens", 2]
    kept = ["--tasks", local / "pairs.yaml", "--out", tmp_path / "tasks", "--json", tmp_path / "c.json"]
    result = ok(cli("compare", llama, compressed, *text, *kept))
    (difference,) = read(tmp_path / "c.json")["models"][1]["against_dense"]["differences"]
    before, after = (
        document_scores(tmp_path / "tasks" / model.name / "pairs.json", "pairs")["acc"] for model in (llama, compressed)
    )
    better, worse = (sum(sign * after[d] > sign * before[d] for d in before) for sign in (1, -1))
    assert (difference["better"], difference["worse"], difference["documents"]) == (better, worse, 12)
    assert difference["difference"] == pytest.approx((better - worse) / 12)
    assert difference["p_value"] == mcnemar(better, worse)
    assert "McNemar" in result.out
