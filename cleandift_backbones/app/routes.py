"""Addresses beside Gradio's own: pictures in, pictures and results out, all of it in memory and never on the disk."""

from __future__ import annotations

import asyncio
import io
from urllib.parse import quote

from starlette.concurrency import run_in_threadpool
from starlette.convertors import Convertor, register_url_convertor
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from ..visualize.pictures import SAMPLES, sample_names
from ..visualize.results import SUFFIXES
from .sessions import Sessions

LARGEST_UPLOAD = 64 << 20  # bytes
SHOWN_SIDE = 640  # longer side of pictures as they are shown
_TYPES = {".png": "image/png", ".safetensors": "application/octet-stream"}


class _NotOurs(Convertor[str]):
    """All of Gradio's own addresses but those that the page calls: the rest leads to files, to other hosts, into the
    source, or writes what visitors say to the disk."""

    regex = r"(?!(?:queue/join|queue/data|run/[^/]+|heartbeat/[^/]+|startup-events|app_id|theme\.css)/?$).*"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("not_ours", _NotOurs())


def routes(sessions: Sessions) -> list[Route]:
    """For the server that the page runs in, before its own."""
    decoding = asyncio.Semaphore(1)  # pictures at a time: one of 179 megapixels takes gigabytes meanwhile

    async def upload(request: Request) -> Response:
        session = sessions.with_token(request.path_params["token"])
        if session is None:
            return JSONResponse(dict(error="This page was closed meanwhile; send it again."))
        content = bytearray()
        async for chunk in request.stream():
            content += chunk
            if len(content) > LARGEST_UPLOAD:
                return JSONResponse(dict(error=f"larger than {LARGEST_UPLOAD >> 20} MB; shrink it first"))

        async with decoding:
            await run_in_threadpool(session.add_upload, bytes(content), request.query_params.get("name", ""))
        return JSONResponse({})  # what there is to say of the picture, the next view says

    def picture(request: Request) -> Response:
        session = sessions.with_token(request.path_params["token"])
        key, _, suffix = request.path_params["file"].rpartition(".")
        found = next((p for p in session.pictures if p.key == key), None) if session else None
        if found is None or suffix not in ("jpg", "png"):
            return _nothing()
        buffer = io.BytesIO()
        if suffix == "png":
            found.image.save(buffer, format="PNG", compress_level=5)
            return _attachment(buffer.getvalue(), "image/png", found.name)  # the name in the three lines of Python
        image = found.image.copy()
        image.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
        image.save(buffer, format="JPEG", quality=92, subsampling=0)
        return Response(buffer.getvalue(), media_type="image/jpeg", headers={"Cache-Control": "private, max-age=3600"})

    def result(request: Request) -> Response:
        session = sessions.with_token(request.path_params["token"])
        name = request.path_params["file"]
        suffix = next((s for s in SUFFIXES if name.endswith(s)), None)
        found = session.result if session else None
        if found is None or f"{found.function}{suffix}" != name:
            return _nothing()
        return _attachment(found.encoded(suffix), _TYPES[suffix], name)

    def sample(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in sample_names():
            return _nothing()
        kind = "image/png" if name.endswith(".png") else "image/jpeg"
        content = (SAMPLES / name).read_bytes()
        return Response(content, media_type=kind, headers={"Cache-Control": "max-age=3600"})

    def closed(request: Request) -> Response:
        return _nothing()

    return [
        Route("/uploads/{token}", upload, methods=["POST"]),
        Route("/pictures/{token}/{file}", picture),
        Route("/results/{token}/{file}", result),
        Route("/samples/{name}", sample),
        Route("/gradio_api/{path:not_ours}", closed, methods=["GET", "HEAD", "POST", "PUT", "DELETE"]),
    ]


def _nothing() -> Response:
    return PlainTextResponse("There is nothing here.", status_code=404)


def _attachment(content: bytes, kind: str, name: str) -> Response:
    named = f"attachment; filename*=UTF-8''{quote(name, safe='')}"
    return Response(content, media_type=kind, headers={"Content-Disposition": named, "Cache-Control": "no-store"})
