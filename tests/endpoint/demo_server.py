"""An OpenAI-compatible server over a tiny model, which can fail."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

MODEL = "demo"


class DemoServer:
    """Answers chat completions with a model.

    Args:
        model: a transformers model.
        processor: its processor.
        completed: request -> completion, for servers of the same model.

    Attributes:
        faults: whether most requests fail the first time.
        logprobs: whether log-probabilities are given.
        continues: whether a given answer is continued; else it is refused.
        stopped_after: number of answers after which there are none; None: no end.
        answered: request -> number of its answers.
        headers: those of every request.
    """

    def __init__(self, model: Any, processor: Any, completed: dict[str, dict[str, Any]]) -> None:
        self.model = model
        self.processor = processor
        self.faults = False
        self.logprobs = True
        self.continues = True
        self.stopped_after: int | None = None
        self.answered: Counter[str] = Counter()
        self.received: Counter[str] = Counter()
        self.headers: list[dict[str, str]] = []
        self._completed = completed
        self._lock = threading.Lock()
        self.app = Starlette(routes=[Route("/v1/chat/completions", self.chat, methods=["POST"])])

    async def chat(self, request: Request) -> Response:
        raw = await request.body()
        body, key = json.loads(raw), hashlib.sha256(raw).hexdigest()
        self.headers.append(dict(request.headers))
        self.received[key] += 1
        if body["model"] != MODEL:
            return JSONResponse({"error": {"message": f"The model `{body['model']}` does not exist."}}, 404)
        if body.get("continue_final_message") and not self.continues:
            return JSONResponse({"detail": "Unexpected fields in the request"}, 422)
        if self.stopped_after is not None and sum(self.answered.values()) >= self.stopped_after:
            return JSONResponse({"error": {"message": "out of memory"}}, 500)
        fault = int(key, 16) % 4 if self.faults and self.received[key] == 1 else 0
        if fault in (1, 2):
            status = (429, 500)[fault - 1]
            return JSONResponse({"error": {"message": "later"}}, status, headers={"Retry-After": "0.01"})
        if key not in self._completed:
            self._completed[key] = await asyncio.to_thread(self.complete, body)
        content = json.loads(json.dumps(self._completed[key]))
        if not self.logprobs:
            content["choices"][0]["logprobs"] = None
        text = json.dumps(content).encode()
        if fault == 3:
            return Response(
                text[:50], headers={"Content-Length": str(len(text))}, media_type="application/json"
            )
        self.answered[key] += 1
        return Response(text, media_type="application/json")

    @torch.no_grad()
    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        tokenizer = self.processor.tokenizer
        user, *rest = body["messages"]
        images = [part["image_url"]["url"] for part in user["content"] if part["type"] == "image_url"]
        content = [{"type": "image"}] * len(images) + [p for p in user["content"] if p["type"] == "text"]
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        if rest:
            assert body["continue_final_message"]
            assert not body["add_generation_prompt"]
            text += rest[0]["content"]
        pictures = [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in images]
        inputs = self.processor(
            text=[text],
            images=[pictures] if pictures else None,
            return_tensors="pt",
            add_special_tokens=False,
        )
        with self._lock:
            output = self.model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=body["max_tokens"],
                pad_token_id=tokenizer.pad_token_id,
                return_dict_in_generate=True,
                output_logits=True,
            )
        prompt = inputs["input_ids"].shape[1]
        ids = output.sequences[0, prompt:].tolist()
        log_p = [torch.log_softmax(logits[0].double(), -1) for logits in output.logits]
        listed = None
        if body.get("logprobs"):
            shown = inputs["input_ids"][0, -1:].tolist() if rest else []
            tokens = enumerate(zip(ids, log_p, strict=True))
            listed = {"content": [self._token(shown + ids[:i], t, p, body) for i, (t, p) in tokens]}
        message = {"role": "assistant", "content": tokenizer.decode(ids, skip_special_tokens=True)}
        choice = {"index": 0, "finish_reason": "stop", "message": message, "logprobs": listed}
        usage = {"prompt_tokens": prompt, "completion_tokens": len(ids), "total_tokens": prompt + len(ids)}
        return {"id": "1", "object": "chat.completion", "model": MODEL, "choices": [choice], "usage": usage}

    def _token(
        self, before: list[int], token: int, log_p: torch.Tensor, body: dict[str, Any]
    ) -> dict[str, Any]:
        tokenizer = self.processor.tokenizer
        start = len(tokenizer.decode(before))

        def entry(number: int, value: float) -> dict[str, Any]:
            text = tokenizer.decode([*before, number])[start:]
            return {"token": text, "logprob": value, "bytes": list(text.encode())}

        top = log_p.topk(body["top_logprobs"])
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return {**entry(token, float(log_p[token])), "top_logprobs": [entry(i, v) for i, v in pairs]}


@contextmanager
def serving(server: Any) -> Iterator[str]:
    """Run the `app` of a server in a thread; yields the address of its API."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    runner = uvicorn.Server(uvicorn.Config(server.app, port=port, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=runner.run, daemon=True)
    thread.start()
    while not runner.started:
        thread.join(0.01)
        assert thread.is_alive()
    try:
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        runner.should_exit = runner.force_exit = True
        thread.join(10)
