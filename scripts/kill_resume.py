"""Kill a compression at random moments, start it again with the same command, and compare what comes out.

    python scripts/kill_resume.py --kills 20 --seed 0 --json kills.json

Every round starts the command in a process of its own and kills that (SIGKILL) after a random time, up to as long as
an undisturbed run takes; what it leaves is resumed by the next one. When a run finishes, its tensors, config and recipe
must be those of the undisturbed run, byte for byte, and every block that was once in the journal must have been taken
from there: a kill costs the block at work, and no more. Then the next run starts from nothing, until there were enough
kills.

The model is a random Llama of `--blocks` blocks, or `--model`. Processes are forked from one that has torch loaded
already, so that a round takes as long as the compression itself.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers

import halfweight.cli
from halfweight.compress.journal import JOURNAL
from halfweight.serving.durable import read_lines

WORDS = "the of and to in a is that it was for on are as with his they at be this from have or by one had not but"
TIMED = ("report.json", "SHA256SUMS")


def make_model(folder: Path, blocks: int) -> None:
    """A random Llama with a word tokenizer, and a text for it beside it."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    vocabulary = {word: i for i, word in enumerate(["<unk>", *WORDS.split()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    generator = random.Random(0)
    (folder / "text.txt").write_text(" ".join(generator.choices(WORDS.split(), k=4000)), encoding="utf-8")


def start(arguments: list[str], log: Path) -> int:
    """Run `halfweight ARGUMENTS` in a forked process whose output goes to `log`; returns its id."""
    child = os.fork()
    if child:
        return child
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout, sys.stderr = [open(number, "w", buffering=1, closefd=False) for number in (1, 2)]  # noqa: SIM115
    sys.argv = ["halfweight", *arguments]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have it ignored in the background
    code = 70
    try:
        halfweight.cli.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def finish(child: int, after: float | None) -> int | None:
    """Wait for `child`; kill it `after` so many seconds. Returns its exit code, None when it was killed."""
    deadline = time.monotonic() + (after if after is not None else 3600)
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return None if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status)


def contents(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir()) if f.name not in TIMED}


def journaled(out: Path) -> int:
    """Blocks that a killed run has finished: those in its journal."""
    lines = read_lines(out.with_name(out.name + ".partial") / JOURNAL)
    return sum(str(line.get("part", "")).startswith("block-") for line in lines)


def kill_and_resume(model: str, recipe: list[str], kills: int, seed: int, work: Path) -> dict[str, Any]:
    """The rounds; returns what happened. Raises SystemExit at the first thing that is not as it must be."""
    log, generator = work / "log", random.Random(seed)

    def command(out: Path) -> list[str]:
        return ["compress", model, *recipe, "--out", str(out)]

    begin = time.monotonic()
    if finish(start(command(work / "whole"), log), None) != 0:
        raise SystemExit(f"the undisturbed run failed; see {log}\n{log.read_text(encoding='utf-8', errors='replace')}")
    seconds = time.monotonic() - begin
    wanted = contents(work / "whole")
    rounds: list[dict[str, Any]] = []
    killed = finished = 0
    out, before = work / "run-0", 0
    while killed < kills or before or out.with_name(out.name + ".partial").exists():
        after = generator.uniform(0, seconds) if killed < kills else None
        code = finish(start(command(out), log), after)
        if code is None:
            killed += 1
            now = journaled(out)
            rounds.append({"killed_after": round(after or 0, 3), "blocks_before": before, "blocks_after": now})
            # Publishing moves the journal along; the artifact is whole then, and checked below.
            published = out.is_dir()
            if now < before and not published:
                raise SystemExit(f"{out}: {before} blocks were finished before the kill, {now} after it")
            before = now
            if not published:
                continue
            if finish(start(command(out), log), None) != 2:
                raise SystemExit(f"{out}: was published, but the same command did not say so")
        elif code != 0:
            raise SystemExit(f"{out}: exit code {code}\n{log.read_text(encoding='utf-8', errors='replace')[-2000:]}")
        else:
            resumed = json.loads((out / "report.json").read_text(encoding="utf-8"))["blocks_resumed"]
            rounds.append({"finished": out.name, "blocks_before": before, "blocks_resumed": resumed})
            if resumed != before:
                raise SystemExit(f"{out}: {before} blocks were in the journal, but blocks_resumed is {resumed}")
        if contents(out) != wanted:
            raise SystemExit(f"{out}: differs from the undisturbed run")
        finished += 1
        out, before = work / f"run-{finished}", 0
    return {"kills": killed, "finished": finished, "seconds": round(seconds, 2), "seed": seed, "rounds": rounds}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--model", help="a folder with a model and text.txt; default: a random one")
    parser.add_argument("--recipe", default="2of4-sparsegpt")
    parser.add_argument("--json", type=Path, help="also write what happened")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="kill-resume-") as folder:
        work = Path(folder)
        if options.model is None:
            make_model(work / "model", options.blocks)
        model = Path(options.model or work / "model")
        recipe = [
            "--recipe",
            options.recipe,
            "--calibration",
            str(model / "text.txt"),
            "--samples",
            "8",
            "--seqlen",
            "32",
        ]
        result = kill_and_resume(str(model), recipe, options.kills, options.seed, work)
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(
        f"{result['kills']} kills, {result['finished']} finished runs, all with the bytes of the undisturbed one"
        f" ({result['seconds']} s); no finished block was done twice"
    )


if __name__ == "__main__":
    main()
