"""Addresses beside Gradio's own: pictures in, pictures and results out, all of it in memory and never on the disk."""

from __future__ import annotations

import io

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from .pictures import SAMPLES, sample_names
from .results import SUFFIXES
from .sessions import Sessions

LARGEST_UPLOAD = 64 << 20  # bytes
SHOWN_SIDE = 640  # longer side of pictures as they are shown
_TYPES = {".png": "image/png", ".safetensors": "application/octet-stream"}
#: Gradio's own ways to files, to other hosts and into the source; nothing here uses them.
_CLOSED = (
    "file={path:path}", "file/{path:path}", "proxy={path:path}", "upload", "upload_progress", "process_recording",
    "vibe-edit", "vibe-edit/", "vibe-code", "vibe-code/", "undo-vibe-edit", "undo-vibe-edit/",
)  # fmt: skip


def routes(sessions: Sessions) -> list[Route]:
    """For the server that the page runs in, before its own."""

    async def upload(request: Request) -> Response:
        session = sessions.with_token(request.path_params["token"])
        if session is None:
            return JSONResponse(dict(error="This page was closed; load it again."))
        content = bytearray()
        async for chunk in request.stream():
            content += chunk
            if len(content) > LARGEST_UPLOAD:
                return JSONResponse(dict(error=f"larger than {LARGEST_UPLOAD >> 20} MB; shrink it first"))

        def read() -> None:
            with session.lock:
                session.add_upload(bytes(content), request.query_params.get("name", ""))

        await run_in_threadpool(read)
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
            return _attachment(buffer.getvalue(), "image/png", f"{found.name.rpartition('.')[0] or found.name}.png")
        image = found.image.copy()
        image.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
        image.save(buffer, format="JPEG", quality=92, subsampling=0)
        return Response(buffer.getvalue(), media_type="image/jpeg", headers={"Cache-Control": "private, max-age=3600"})

    def result(request: Request) -> Response:
        session = sessions.with_token(request.path_params["token"])
        name = request.path_params["file"]
        suffix = next((s for s in SUFFIXES if name.endswith(s)), None)
        made = list(session.results.values()) if session else []
        found = next((r for r in made if f"{r.function}{suffix}" == name), None)
        if found is None:
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
        *(Route(f"/gradio_api/{path}", closed, methods=["GET", "HEAD", "POST"]) for path in _CLOSED),
    ]


def _nothing() -> Response:
    return PlainTextResponse("There is nothing here.", status_code=404)


def _attachment(content: bytes, kind: str, name: str) -> Response:
    plain = "".join(c if c.isascii() and (c.isalnum() or c in "-_. ()") else "_" for c in name)
    headers = {"Content-Disposition": f'attachment; filename="{plain}"', "Cache-Control": "no-store"}
    return Response(content, media_type=kind, headers=headers)
