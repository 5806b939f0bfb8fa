"""A text server over one compressed checkpoint: `python docs/example_server.py DIR` (needs fastapi and uvicorn).

    curl -N localhost:8000/generate -H 'content-type: application/json' -d '{"prompt": "The sea was"}'

The text comes as it is generated. Requests run beside each other, in threads, on the one model.
"""

from __future__ import annotations

import argparse
import threading
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field
from transformers import TextIteratorStreamer

import halfweight


class Request(BaseModel):
    prompt: str = Field(min_length=1)
    max_new_tokens: int = Field(default=64, ge=1, le=1024)


def create_app(folder: str) -> FastAPI:
    """The server's application; loading and checking every kernel happens here, before the first request."""
    model, tokenizer = halfweight.load(folder), halfweight.load_tokenizer(folder)
    choices = halfweight.warmup(model)
    app = FastAPI()

    @app.get("/kernels")
    def kernels() -> list[halfweight.Choice]:
        return choices

    @app.post("/generate")
    def generate(request: Request) -> StreamingResponse:
        inputs = tokenizer(request.prompt, return_tensors="pt").to(model.device)
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
        settings = {**inputs, "max_new_tokens": request.max_new_tokens, "do_sample": False, "streamer": streamer}

        def text() -> Iterator[str]:
            threading.Thread(target=model.generate, kwargs=settings, daemon=True).start()
            yield from streamer

        return StreamingResponse(text(), media_type="text/plain")

    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    uvicorn.run(create_app(arguments.folder), host="127.0.0.1", port=arguments.port)
