"""`load` and what users build on the loaded model: threads, caches, pipelines, adapters, compilation, a server."""

from __future__ import annotations

import importlib.util
import json
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, pipeline

import halfweight
from artifacts import IDS, Q, assert_same
from halfweight.serving.linear import expand_linears

PROMPT = IDS[:, :6]
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def expanded(artifact: Path) -> Any:
    """The artifact with every compressed linear as an ordinary one: what dense transformers would do."""
    model = halfweight.load(artifact, dtype="float32")
    expand_linears(model, torch.float32)
    return model


def generated(model: Any, **settings: Any) -> list[int]:
    mask = torch.ones_like(PROMPT)
    tokens: Tensor = model.generate(PROMPT, attention_mask=mask, max_new_tokens=8, do_sample=False, **settings)
    return [int(token) for token in tokens[0]]


# --- backends and threads ------------------------------------------------------------------------------------------


def test_backends_are_chosen_per_model_and_agree(artifact: Path) -> None:
    models = {name: halfweight.load(artifact, dtype="float32", backend=name) for name in ("auto", "reference")}
    with torch.no_grad():
        logits = [model(IDS).logits for model in models.values()]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    assert {choice.backend for choice in halfweight.explain(models["reference"])} == {"reference"}
    assert "was asked for" in halfweight.explain(models["reference"])[0].reason
    assert {choice.backend for choice in halfweight.explain(models["auto"])} != {"undecided"}


def test_backends_that_cannot_run_are_refused_with_the_reason(artifact: Path) -> None:
    with pytest.raises(halfweight.InputError, match="q_proj: backend 'triton' cannot run it"):
        halfweight.load(artifact, device="cpu", backend="triton")
    with pytest.raises(halfweight.InputError, match="did you mean 'reference'"):
        halfweight.load(artifact, backend="refrence")


def test_threads_share_a_model_that_was_never_run(artifact: Path) -> None:
    want = halfweight.load(artifact, dtype="float32")
    windows = [IDS + i for i in range(8)]
    start = threading.Barrier(4)

    def run(model: Any, worker: int) -> list[Tensor]:
        start.wait()
        with torch.no_grad():
            return [model(window).logits for window in windows[worker::4]]

    model = halfweight.load(artifact, dtype="float32")
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda worker: run(model, worker), range(4)))
    with torch.no_grad():
        for worker, logits in enumerate(results):
            for window, got in zip(windows[worker::4], logits, strict=True):
                assert torch.equal(got, want(window).logits)


# --- transformers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [None, "dynamic", "static", "offloaded", "quantized"])
def test_every_cache_that_works_for_the_dense_model_works(cache: str | None, artifact: Path, expanded: Any) -> None:
    try:
        want = generated(expanded, cache_implementation=cache)
    except Exception as error:
        pytest.skip(f"the dense model cannot use this cache here: {' '.join(str(error).split())[:80]}")
    assert generated(halfweight.load(artifact, dtype="float32"), cache_implementation=cache) == want


def test_pipeline_generates_text(artifact: Path) -> None:
    model, tokenizer = halfweight.load(artifact), halfweight.load_tokenizer(artifact)
    writer = pipeline("text-generation", model=model, tokenizer=tokenizer)
    text = writer("the of and to", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    ids = tokenizer("the of and to", return_tensors="pt")
    tokens = model.generate(**ids, max_new_tokens=4, do_sample=False)[0]
    # The pipeline decodes prompt and answer apart, between which this tokenizer writes a space.
    assert text.replace(" ", "") == tokenizer.decode(tokens, skip_special_tokens=True).replace(" ", "")


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_maps_load_the_same_model(device_map: Any, artifact: Path) -> None:
    mapped = AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.float32, device_map=device_map)
    with torch.no_grad():
        assert torch.equal(mapped(IDS).logits, halfweight.load(artifact, dtype="float32")(IDS).logits)


def test_a_compiled_block_computes_the_same(artifact: Path) -> None:
    torch.compiler.reset()
    mlp = halfweight.load(artifact, dtype="float32").model.layers[0].mlp
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = mlp(x)
        compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), want, rtol=1e-5, atol=1e-5)


# --- gradients and adapters ----------------------------------------------------------------------------------------


def test_gradients_pass_through_compressed_weights_to_their_inputs(artifact: Path, expanded: Any) -> None:
    models = [halfweight.load(artifact, dtype="float32"), expanded]
    gradients = []
    for model in models:
        embeddings = model.get_input_embeddings()(IDS).detach().requires_grad_()
        model(inputs_embeds=embeddings).logits.square().mean().backward()
        gradients.append(embeddings.grad)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


def test_lora_adapters_train_and_leave_the_compressed_weights(artifact: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    base = halfweight.load(artifact, dtype="float32")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(base, halfweight.lora_config(**settings))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trainable) == 2 * 2 * 2
    optimizer = torch.optim.Adam(trainable, lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    with torch.no_grad():
        tuned = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path / "adapter")
    assert_same(before, {name: tensor for name, tensor in model.unload().state_dict().items()})

    again = peft.get_peft_model(halfweight.load(artifact, dtype="float32"), halfweight.lora_config(**settings))
    peft.set_peft_model_state_dict(again, peft.load_peft_weights(str(tmp_path / "adapter")))
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=IDS).logits, tuned, rtol=1e-5, atol=1e-5)


def test_dora_is_refused(artifact: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    with pytest.raises(halfweight.InputError, match="plain LoRA"):
        config = halfweight.lora_config(target_modules=["q_proj"], use_dora=True)
        peft.get_peft_model(halfweight.load(artifact), config)


# --- the example server --------------------------------------------------------------------------------------------


def test_the_example_server_is_short() -> None:
    assert len((ROOT / "docs" / "example_server.py").read_text(encoding="utf-8").splitlines()) < 60


@pytest.fixture
def server(artifact: Path) -> Iterator[str]:
    """The example server in a process of its own, over loopback."""
    missing = [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(ROOT / "docs" / "example_server.py"), str(artifact), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert process.poll() is None, process.stderr and process.stderr.read()
            try:
                urllib.request.urlopen(f"{url}/kernels", timeout=5).read()
                break
            except OSError:
                time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(20)


def test_the_example_server_streams_to_concurrent_clients(server: str, artifact: Path) -> None:
    with urllib.request.urlopen(f"{server}/kernels", timeout=30) as response:
        assert any(choice["name"] == Q for choice in json.load(response))
    model, tokenizer = halfweight.load(artifact), halfweight.load_tokenizer(artifact)
    prompts = ["the of and to in", "it was for on are", "be at one had not"]

    def ask(prompt: str) -> tuple[int, str]:
        body = json.dumps({"prompt": prompt, "max_new_tokens": 12}).encode()
        request = urllib.request.Request(f"{server}/generate", body, {"content-type": "application/json"})
        pieces = []
        with urllib.request.urlopen(request, timeout=120) as response:
            while piece := response.read1(64):
                pieces.append(piece.decode())
        return len(pieces), "".join(pieces)

    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(ask, prompts))
    for prompt, (_, text) in zip(prompts, answers, strict=True):
        inputs = tokenizer(prompt, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert text.split() == tokenizer.decode(tokens, skip_special_tokens=True).split()
    assert any(pieces > 1 for pieces, _ in answers)
