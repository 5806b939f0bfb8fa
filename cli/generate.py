"""`halfweight generate`."""

from __future__ import annotations

from typing import Annotated

import typer
from pydantic import BaseModel

from . import options
from .output import err, human_seconds, out, say, write_json


class Generation(BaseModel):
    """What `--json` gets: the continuation and how long it took."""

    prompt: str
    text: str
    tokens: int
    seconds: float


def generate(
    model: options.Model,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after this many tokens.")] = 32,
    temperature: Annotated[float, typer.Option(min=0, help="Sample at this temperature; 0 is greedy.")] = 0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Sample from the likeliest tokens of this mass.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of the samples.")] = 0,
    json: options.Json = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Continue a prompt, greedily or by sampling.

    Examples:

        halfweight generate smollm2-2of4 --prompt "The capital of France is" --max-new-tokens 16

        halfweight generate smollm2-2of4 --prompt "Once upon a time" --temperature 0.7 --top-p 0.9 --seed 1
    """
    import time

    from transformers import set_seed

    from ..serving.errors import InputError
    from ..serving.load import load, load_tokenizer
    from ..serving.sources import resolve_model

    if top_p < 1 and temperature == 0:
        raise InputError("--top-p is for sampling; give a --temperature above 0, too")
    source = resolve_model(model, trust_remote_code=trust_remote_code, report=say)
    tokenizer = load_tokenizer(source.path)
    inputs = tokenizer(prompt, return_tensors="pt")
    if inputs["input_ids"].shape[1] == 0:
        raise InputError("--prompt has no tokens; give some text to continue")
    network = load(source.path, device, dtype)
    sampling: dict[str, float] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        set_seed(seed)
    begin = time.monotonic()
    with err.status("generating"):
        output = network.generate(**inputs.to(network.device), max_new_tokens=max_new_tokens, **sampling)
    new = output[0, inputs["input_ids"].shape[1] :]
    seconds = time.monotonic() - begin
    result = Generation(
        prompt=prompt, text=tokenizer.decode(new, skip_special_tokens=True), tokens=len(new), seconds=seconds
    )
    write_json(json, result)
    out.print(prompt + result.text, markup=False, highlight=False, soft_wrap=True)
    say(f"{result.tokens} tokens in {human_seconds(seconds)} ({result.tokens / seconds:.1f} per second)")
