"""A bare proxy over FastAPI and httpx: `python fastapi_proxy.py BACKEND_PORT PORT [CERTIFICATE KEY]`.

The same as aiohttp_proxy.py, under uvicorn with what it recommends (uvloop, httptools).
"""

import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

BACKEND, PORT = sys.argv[1:3]
URL = f"http://127.0.0.1:{BACKEND}/v1/chat/completions"
JSON = {"Content-Type": "application/json"}
client = httpx.AsyncClient(timeout=None, limits=httpx.Limits(max_connections=None))  # noqa: S113


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """One client for all."""
    async with client:
        yield


app = FastAPI(lifespan=lifespan)


@app.get("/health")
async def health() -> str:
    """It serves."""
    return "ok"


@app.post("/v1/chat/completions")
async def relay(request: Request) -> Response:
    """What the model server says, as it says it."""
    asking = client.build_request("POST", URL, content=await request.body(), headers=JSON)
    answer = await client.send(asking, stream=True)
    kind = answer.headers["content-type"]
    if kind != "text/event-stream":
        content = await answer.aread()
        return Response(content, answer.status_code, media_type=kind)

    async def pieces() -> AsyncIterator[bytes]:
        try:
            async for piece in answer.aiter_raw():
                yield piece
        finally:
            await answer.aclose()

    return StreamingResponse(pieces(), answer.status_code, media_type=kind)


@app.post("/gather/v1/chat/completions")
async def gather(request: Request) -> Response:
    """One answer, from a stream."""
    asked = await request.json()
    asked["stream"] = True
    asked["stream_options"] = {"include_usage": True}
    parts: list[str] = []
    finish, model, usage = None, None, None
    async with client.stream("POST", URL, json=asked) as answer:
        async for line in answer.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line[6:])
            for choice in chunk["choices"]:
                parts.append(choice["delta"].get("content") or "")
                finish = choice["finish_reason"] or finish
            model, usage = chunk["model"], chunk.get("usage") or usage
    message = {"role": "assistant", "content": "".join(parts)}
    return JSONResponse(
        {"choices": [{"index": 0, "message": message, "finish_reason": finish}], "model": model, "usage": usage}
    )


if __name__ == "__main__":
    tls = {"ssl_certfile": sys.argv[3], "ssl_keyfile": sys.argv[4]} if len(sys.argv) > 3 else {}
    uvicorn.run(
        app,
        host="127.0.0.1",
        port=int(PORT),
        access_log=False,
        log_level="warning",
        backlog=4096,
        **tls,  # type: ignore[arg-type]
    )
