"""Prune and quantize models with halfweight and with llm-compressor, and compare perplexity, seconds and memory.

    python scripts/compare_llmcompressor.py --models smollm2=PATH gemma3=PATH --calibration C4.txt \\
        --text WIKITEXT.txt --methods sparsegpt wanda admm --seeds 0 1 2 --out results/

Both tools see the same calibration windows and run on the CPU as one child process each, measured from
outside: wall seconds and peak resident memory of that process, imports included. `halfweight eval` scores the
dense model and every pruned one. Runs of the two tools alternate, so slow spells of the machine hit both.
Each finished run is a small JSON file in --out; the same command goes on where it stopped, and --report-only makes the
table of all finished runs. A run also records how much CPU time everything else on the machine took meanwhile: seconds
are reported only over seeds whose runs, of both tools, had the machine to themselves.

halfweight's time includes tokenizing the calibration text, dev-set perplexities, and reloading and checking what it
wrote; the peer is handed token ids and only saves.

This process stays small on purpose: Linux counts the memory of the parent that starts a child into the
child's peak, so whatever needs torch happens in a process of its own.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import TypeVar

import psutil
from comparison_table import Record, idle, machine_facts, markdown, print_table
from peers.llmcompressor_oneshot import check_two_of_four
from rich.console import Console

PEER = "llmcompressor"
OURS = "halfweight"
PEER_PACKAGE = "llmcompressor>=0.14,<0.15"
HALFWEIGHT = [str(Path(sys.executable).with_name(OURS))]
PEER_SCRIPT = Path(__file__).resolve().parent / "peers" / "llmcompressor_oneshot.py"
# halfweight's method -> the peer's method it is held against. The peer has no ADMM and no groups, so its best 2:4
# stands in; its int4 is symmetric, in groups of 64, and its 2:4 with int4 is one pass after the other.
COUNTERPART = {
    "sparsegpt": "sparsegpt",
    "wanda": "wanda",
    "admm": "sparsegpt",
    "w4-g64": "w4-g64",
    "w4-g64-sym": "w4-g64",
    "2of4-w4": "2of4-w4",
    "2of4-w4-lowrank": "2of4-w4",
    "gqsa-w4s20": "sparsegpt",
    "gqsa-w4s30": "sparsegpt",
    "gqsa-w4s50": "sparsegpt",
}
# Bits per linear weight that the peer stores: 16 for what it saves dense, else int4 with a 16-bit scale per 64.
PEER_BITS = {"sparsegpt": 16.0, "wanda": 16.0, "w4-g64": 4.25, "2of4-w4": 4.25}
PRUNERS = ("sparsegpt", "wanda", "admm")  # their recipes are named 2of4-...

T = TypeVar("T")
Key = tuple[str, str, str, int]  # model, tool, method, seed
console = Console()


# --- windows: the calibration tokens both tools use ---


def make_windows(model: Path, text: Path, samples: int, seqlen: int, seed: int, out: Path) -> str:
    """Save the windows that `halfweight compress` would sample, and return their SHA-256."""
    import torch
    from safetensors.torch import save_file

    from halfweight.compress.calibration import load_windows
    from halfweight.compress.journal import tokens_hash
    from halfweight.compress.recipe import Calibration
    from halfweight.serving.load import load_tokenizer

    settings = Calibration(data=str(text), samples=samples, seqlen=seqlen, seed=seed)
    windows = load_windows(settings, load_tokenizer(model), model).calibration
    save_file({"input_ids": torch.stack(windows)}, out)
    return tokens_hash(windows)


# --- processes ---


def in_fresh_process(function: Callable[..., T], *args: object) -> T:
    """Call `function` in a new interpreter, so that what it imports and allocates never enters this one."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def child_environment(threads: int) -> dict[str, str]:
    """The same surroundings for every child: fixed threads, no GPU, no network look-ups."""
    fixed = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), str(threads))
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **fixed, **offline, "CUDA_VISIBLE_DEVICES": ""}


def busy_seconds() -> float:
    """CPU seconds that this machine's cores have worked, or had taken away by a hypervisor, since it started."""
    times = psutil.cpu_times()._asdict()
    return float(sum(times.get(kind, 0.0) for kind in ("user", "nice", "system", "irq", "softirq", "steal")))


def run_child(command: Sequence[object], log: Path, threads: int) -> Record:
    """Run a command to its end; return wall seconds, CPU seconds and peak resident memory in GB (1e9 bytes).

    `others_share` is the part of all cores' time that went to other processes meanwhile.

    Memory is `ru_maxrss` from wait4, as /usr/bin/time reports it: the largest single process among the child
    and the descendants it waited for, not their sum. Neither tool starts workers here.
    """
    words, busy = [str(word) for word in command], busy_seconds()
    begun = time.perf_counter()
    with log.open("wb") as stream:
        process = subprocess.Popen(words, stdout=stream, stderr=stream, env=child_environment(threads))
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            process.wait()
            raise
    seconds = time.perf_counter() - begun
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        tail = log.read_text(encoding="utf-8", errors="replace")[-2000:]
        raise SystemExit(f"exit status {process.returncode} from: {' '.join(words)}\n{tail}")
    unit, own = 1 if sys.platform == "darwin" else 1024, usage.ru_utime + usage.ru_stime
    return {
        "seconds": seconds,
        "cpu_seconds": own,
        "peak_gb": usage.ru_maxrss * unit / 1e9,
        "others_share": max(0.0, busy_seconds() - busy - own) / (seconds * (os.cpu_count() or 1)),
    }


def ensure_peer_python(args: argparse.Namespace) -> Path:
    """Return the interpreter of the peer's environment, building that environment on the first call."""
    if args.peer_python is not None:
        return Path(args.peer_python)
    folder: Path = args.work / "peer-env"
    python, done = folder / "bin" / "python", folder / "installed"
    if not done.exists():
        console.print(f"building the environment for {PEER_PACKAGE} in {folder}")
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        for requirement in (args.peer_torch, PEER_PACKAGE):
            subprocess.run([str(python), "-m", "pip", "install", "-q", requirement], check=True)
        done.write_text(f"{args.peer_torch}\n{PEER_PACKAGE}\n", encoding="utf-8")
    return python


# --- cells: one finished run each ---


def write_json(path: Path, value: object) -> None:
    """Write JSON so that a reader sees the old file or the whole new one."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    partial.replace(path)


def read_json(path: Path) -> Record:
    """The record in a JSON file, or an empty one when the file is not there."""
    if not path.exists():
        return {}
    record: Record = json.loads(path.read_text(encoding="utf-8"))
    return record


def file_sha256(*paths: Path) -> str:
    """SHA-256 over the contents of the files, in the order given."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


class Comparison:
    """The runs that one command asks for, their files, and the report over them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.peer_python = ensure_peer_python(args)
        self.protocol: Record = {
            "samples": args.samples,
            "seqlen": args.seqlen,
            "eval_windows": args.windows,
            "threads": args.threads,
            "peer_precision": args.peer_precision,
            "calibration_sha256": file_sha256(args.calibration),
            "text_sha256": file_sha256(args.text),
        }
        self.cells: dict[Key, Record] = {}
        self.digests: dict[tuple[str, int], str] = {}

    def run(self) -> None:
        """Make every cell, peer and halfweight in turn, and refresh the report after each seed."""
        for model, folder in self.args.models.items():
            weights = file_sha256(*sorted(folder.glob("*.safetensors")))
            settings = {**self.protocol, "model_sha256": weights}
            self.cell((model, "dense", "none", 0), settings)
            for seed in self.args.seeds:
                for method in self.args.methods:
                    self.cell((model, PEER, COUNTERPART[method], seed), settings)
                    self.cell((model, OURS, method, seed), settings)
                self.report()

    def read_finished(self) -> None:
        """Take every finished run in --out into `cells`, whatever this command's models, methods and seeds."""
        for path in sorted(self.args.out.glob("*.json")):
            record = read_json(path)
            if {"model", "tool", "method", "seed"} <= record.keys():
                self.cells[record["model"], record["tool"], record["method"], record["seed"]] = record
        self.report()

    def cell(self, key: Key, settings: Record) -> None:
        """Put the finished run for this key into `cells`, making it when there is none and its tool is in --tools."""
        if key in self.cells:
            return
        model, tool, method, seed = key
        name = f"{model}.dense" if tool == "dense" else f"{model}.{tool}.{method}.seed{seed}"
        path, work = self.args.out / f"{name}.json", self.args.work / name
        record = {} if tool in self.args.fresh else read_json(path)
        if record and record["settings"] != settings:
            changed = sorted(item for item in settings if record["settings"].get(item) != settings[item])
            raise SystemExit(f"{path} was made with other {', '.join(changed)}; add --fresh or change --out")
        if not record and tool not in self.args.tools:
            return
        if not record:
            console.print(f"[bold]{name}[/bold]")
            record = {"model": model, "tool": tool, "method": method, "seed": seed, "settings": settings}
            if tool == "dense":
                work.mkdir(parents=True, exist_ok=True)
                record["perplexity"] = self.perplexity(self.args.models[model], work)
            else:
                record |= self.measured(key, settings, work)
                record["perplexity"] = self.perplexity(work / "model", work)
            record["finished"] = time.strftime("%Y-%m-%d %H:%M:%S %z")
            write_json(path, record)
            if not self.args.keep:
                shutil.rmtree(work)
        self.cells[key] = record

    def measured(self, key: Key, settings: Record, work: Path) -> Record:
        """Compress into `work`/model, or take over what an earlier, interrupted command measured."""
        path = work / "measured.json"
        earlier = {} if key[1] in self.args.fresh else read_json(path)
        if earlier.get("settings") == settings:
            return earlier
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        record = {**self.compress(key, work), "settings": settings}
        write_json(path, record)
        return record

    def compress(self, key: Key, work: Path) -> Record:
        """Run one tool once; leave the checkpoint in `work`/model and return what was measured."""
        args, (model, tool, method, seed) = self.args, key
        dense, out, inner = args.models[model], work / "model", work / "inner.json"
        windows, digest = self.windows(model, seed)
        if tool == PEER:
            command = [self.peer_python, "-E", PEER_SCRIPT, dense, "--windows", windows, "--method", method]
            command += ["--threads", args.threads, "--precision", args.peer_precision]
        else:
            recipe = f"2of4-{method}" if method in PRUNERS else method
            command = [*HALFWEIGHT, "compress", dense, "--recipe", recipe, "--overwrite"]
            command += ["--calibration", args.calibration, "--samples", args.samples]
            command += ["--seqlen", args.seqlen, "--seed", seed]
        record = run_child([*command, "--out", out, "--json", inner], work / "compress.log", args.threads)
        record |= {"inner": read_json(inner), "windows_sha256": digest}
        if record["inner"].get("windows_sha256", digest) != digest:
            raise SystemExit(f"{tool} calibrated {model} on other windows than this script made (seed {seed})")
        if tool == PEER:
            check = {"w4-g64": no_pattern, "2of4-w4": pattern_left}.get(method, check_two_of_four)
            return record | in_fresh_process(check, dense, out)
        facts = work / "inspect.json"
        run_child([*HALFWEIGHT, "inspect", out, "--json", facts], work / "inspect.log", args.threads)
        return {**record, "linear_bytes_ratio": read_json(facts)["linear_bytes_ratio"]}

    def windows(self, model: str, seed: int) -> tuple[Path, str]:
        """The calibration windows of this model and seed as a file, made once, and their SHA-256."""
        args, path = self.args, self.args.work / f"{model}.seed{seed}.windows.safetensors"
        if (model, seed) not in self.digests:
            sampling = (args.models[model], args.calibration, args.samples, args.seqlen, seed, path)
            self.digests[model, seed] = in_fresh_process(make_windows, *sampling)
        return path, self.digests[model, seed]

    def perplexity(self, folder: Path, work: Path) -> float:
        """Score a checkpoint with `halfweight eval`."""
        args, out = self.args, work / "eval.json"
        command = [*HALFWEIGHT, "eval", folder, "--text", args.text, "--windows", args.windows]
        run_child([*command, "--seqlen", args.seqlen, "--json", out], work / "eval.log", args.threads)
        return float(read_json(out)["perplexity"])

    def rows(self) -> list[Record]:
        """One row per model, tool and method: means over seeds, and ratios to the peer's."""
        rows: list[Record] = []
        peers = dict.fromkeys(COUNTERPART[method] for method in self.args.methods)
        wanted = [(PEER, method) for method in peers] + [(OURS, method) for method in self.args.methods]
        for model in self.args.models:
            if dense := self.cells.get((model, "dense", "none", 0)):
                rows.append({"model": model, "tool": "dense", "method": "-", "perplexity": dense["perplexity"]})
            for tool, method in wanted:
                seeds = [seed for seed in self.args.seeds if (model, tool, method, seed) in self.cells]
                if seeds:
                    rows.append(self.row(model, tool, method, seeds))
        return rows

    def row(self, model: str, tool: str, method: str, seeds: list[int]) -> Record:
        """Means of one tool and method over `seeds`; for halfweight also ratios to the peer's, over the seeds of both.

        Times are left out unless a seed's run, and the peer's, had the machine to themselves.
        """
        peers = {seed: self.cells.get((model, PEER, COUNTERPART[method], seed)) for seed in seeds}
        own = {seed: self.cells[model, tool, method, seed] for seed in seeds}
        row: Record = {"model": model, "tool": tool, "method": method, "seeds": seeds}
        row["timed_seeds"] = [seed for seed in seeds if all(idle(cell) for cell in (own[seed], peers[seed]) if cell)]
        for name in ("perplexity", "peak_gb", "seconds", "cpu_seconds"):
            chosen = row["timed_seeds"] if name.endswith("seconds") else seeds
            if chosen:
                row[name] = fmean(own[seed][name] for seed in chosen)
                row[f"{name}_each"] = [own[seed][name] for seed in chosen]
            pairs = [(own[seed][name], peer[name]) for seed in chosen if (peer := peers[seed])]
            if tool == OURS and pairs:
                row[f"{name}_ratio"] = fmean(ours for ours, _ in pairs) / fmean(theirs for _, theirs in pairs)
        if tool == PEER:
            row["bits"] = PEER_BITS[method]
        else:
            row["compared_with"] = COUNTERPART[method]
            row["linear_bytes_ratio"] = fmean(cell["linear_bytes_ratio"] for cell in own.values())
        return row

    def report(self) -> None:
        """Write compare.json and compare.md."""
        machine = machine_facts()
        made_by_peer = (cell for cell in self.cells.values() if cell["tool"] == PEER)
        machine["versions"][PEER] = next((cell["inner"]["versions"] for cell in made_by_peer), {})
        whole: Record = {"machine": machine, "protocol": self.protocol, "rows": self.rows()}
        write_json(self.args.out / "compare.json", whole)
        (self.args.out / "compare.md").write_text(markdown(**whole), encoding="utf-8")


def no_pattern(dense: Path, compressed: Path) -> Record:
    """Nothing to check."""
    return {}


def pattern_left(dense: Path, compressed: Path) -> Record:
    """Whether quantizing after pruning has left the 2:4 pattern; llm-compressor does not promise it."""
    try:
        return {"two_of_four": True, **check_two_of_four(dense, compressed)}
    except ValueError as error:
        return {"two_of_four": False, "problem": str(error)}


# --- the command line ---


def named_path(text: str) -> tuple[str, Path]:
    """Parse NAME=PATH."""
    name, _, path = text.partition("=")
    if not name or not (Path(path) / "config.json").exists():
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=PATH with PATH a Hugging Face folder")
    return name, Path(path).resolve()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--models", nargs="+", type=named_path, required=True, metavar="NAME=PATH")
    parser.add_argument("--calibration", type=Path, required=True, help="text file to sample windows from")
    parser.add_argument("--text", type=Path, required=True, help="test text for perplexity")
    parser.add_argument("--methods", nargs="+", choices=list(COUNTERPART), default=list(PRUNERS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--tools", nargs="+", choices=["dense", PEER, OURS], default=["dense", PEER, OURS], help="whose runs to make"
    )
    parser.add_argument("--samples", type=int, default=32, help="calibration windows")
    parser.add_argument("--seqlen", type=int, default=1024, help="tokens per window")
    parser.add_argument("--windows", type=int, default=16, help="test windows for perplexity")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True, help="folder for a JSON file per run and the report")
    parser.add_argument("--work", type=Path, default=Path("build/compare"), help="for checkpoints and logs")
    parser.add_argument("--keep", action="store_true", help="keep checkpoints and logs after evaluation")
    parser.add_argument(
        "--fresh",
        nargs="*",
        choices=["dense", PEER, OURS],
        help="redo finished runs (of the tools named, or of all)",
    )
    parser.add_argument("--report-only", action="store_true", help="run nothing; tabulate what --out holds")
    parser.add_argument(
        "--peer-precision",
        choices=["float32", "auto"],
        default="float32",
        help="what llm-compressor computes in; auto is the checkpoint's dtype",
    )
    parser.add_argument("--peer-python", help="interpreter with llm-compressor (default: build one)")
    parser.add_argument("--peer-torch", default="torch==2.13.0", help="torch for that environment")
    args = parser.parse_args()
    args.models = dict(args.models)
    args.fresh = ["dense", PEER, OURS] if args.fresh == [] else args.fresh or []
    args.calibration, args.text = args.calibration.resolve(), args.text.resolve()
    args.work = args.work.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    args.work.mkdir(parents=True, exist_ok=True)
    return args


def main() -> None:
    comparison = Comparison(parse_args())
    comparison.read_finished() if comparison.args.report_only else comparison.run()
    print_table(comparison.rows())


if __name__ == "__main__":
    main()
