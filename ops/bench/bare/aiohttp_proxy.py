"""A bare proxy over aiohttp: `python aiohttp_proxy.py BACKEND_PORT PORT [CERTIFICATE KEY]`.

`/v1/chat/completions` is relayed as it is, in pieces as they come. Under `/gather` the model server is always asked to
stream, as AI Ticket asks it, and the caller gets the text in one piece.
"""

import json
import ssl
import sys
from collections.abc import AsyncIterator

from aiohttp import ClientSession, ClientTimeout, TCPConnector, web

BACKEND, PORT = sys.argv[1:3]
URL = f"http://127.0.0.1:{BACKEND}/v1/chat/completions"
JSON = {"Content-Type": "application/json"}
SESSION = web.AppKey("session", ClientSession)


async def session(app: web.Application) -> AsyncIterator[None]:
    """One client for all."""
    async with ClientSession(connector=TCPConnector(limit=0), timeout=ClientTimeout(total=None)) as client:
        app[SESSION] = client
        yield


async def health(request: web.Request) -> web.Response:
    """It serves."""
    return web.Response(text="ok")


async def relay(request: web.Request) -> web.StreamResponse:
    """What the model server says, as it says it."""
    body = await request.read()
    async with request.app[SESSION].post(URL, data=body, headers=JSON) as answer:
        if answer.content_type != "text/event-stream":
            return web.Response(status=answer.status, body=await answer.read(), content_type=answer.content_type)
        response = web.StreamResponse(status=answer.status, headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        async for piece in answer.content.iter_any():
            await response.write(piece)
        await response.write_eof()
        return response


async def gather(request: web.Request) -> web.Response:
    """One answer, from a stream."""
    asked = json.loads(await request.read())
    asked["stream"] = True
    asked["stream_options"] = {"include_usage": True}
    parts: list[str] = []
    finish, model, usage = None, None, None
    async with request.app[SESSION].post(URL, data=json.dumps(asked), headers=JSON) as answer:
        async for line in answer.content:
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            chunk = json.loads(line[6:])
            for choice in chunk["choices"]:
                parts.append(choice["delta"].get("content") or "")
                finish = choice["finish_reason"] or finish
            model, usage = chunk["model"], chunk.get("usage") or usage
    message = {"role": "assistant", "content": "".join(parts)}
    choice = {"index": 0, "message": message, "finish_reason": finish}
    return web.json_response({"choices": [choice], "model": model, "usage": usage})


def main() -> None:
    """Serve."""
    app = web.Application(client_max_size=2**21)
    app.cleanup_ctx.append(session)
    app.add_routes(
        [
            web.get("/health", health),
            web.post("/v1/chat/completions", relay),
            web.post("/gather/v1/chat/completions", gather),
        ]
    )
    context = None
    if len(sys.argv) > 3:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(*sys.argv[3:5])
    web.run_app(
        app, host="127.0.0.1", port=int(PORT), ssl_context=context, access_log=None, backlog=4096, print=lambda _: None
    )


if __name__ == "__main__":
    main()
