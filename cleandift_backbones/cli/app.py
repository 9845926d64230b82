"""`cleandift app`: the page, served on this machine."""

from __future__ import annotations

import argparse
import logging
import os
import socket
import sys
import threading
from collections.abc import Sequence

from ..utils.guard import guard, importing
from .arguments import command_parser, option

ABOUT = """
Click a point, find it in other images; look at all maps, and at clean against noisy features.

Needs the extra: pip install "cleandift_backbones[demo]". Nothing is sent anywhere, and nothing is fetched from another
host; only --download lets weights be fetched from the Hub. Uploaded images stay in memory, and go when their page
closes.
"""
EXAMPLES = [
    ("", "the small model and sample images, offline"),
    ("--model cleandift_sd21 dift_sd21", "Stable Diffusion's, if their weights are on this machine"),
    ("--model local-dir:runs/mine/native", "a folder of `cleandift finetune` or `cleandift convert`"),
    ("--model resnet50 hf-hub:USER/REPO", "any timm model, any repository"),
]


@guard("the page is closed, and uploaded images are gone")
def main(arguments: Sequence[str] | None = None) -> None:
    """Serves the page until Ctrl-C. See `utils.guard.guard` for exit codes."""
    args = parser().parse_args(arguments)
    if not args.download:  # read when huggingface_hub is imported
        os.environ["HF_HUB_OFFLINE"] = "1"
    logging.getLogger("timm").setLevel(logging.ERROR)
    with importing():
        from ..app.page import MODELS, Page
        from ..utils.errors import InputError, file_errors
    if args.memory < 16:
        raise InputError(f"--memory {args.memory} is too small; give at least 16 (MB)")
    if args.port is not None and not 0 < args.port < 65536:
        raise InputError(f"--port {args.port} is out of range; give 1..65535")
    with file_errors(f"--host {args.host}"):
        socket.getaddrinfo(args.host, args.port)
    page = Page(args.models or MODELS, args.memory << 20, args.device)
    with file_errors(f"--host {args.host} --port {args.port or 7860}"):
        address = page.launch(args.host, args.port, prevent_thread_lock=True, inbrowser=args.open)
    print(f"look at features on {address} (Ctrl-C ends it)", flush=True)
    try:
        threading.Event().wait()
    finally:
        page.blocks.close(verbose=False)


def parser() -> argparse.ArgumentParser:
    """All options."""
    result = command_parser("app", EXAMPLES, ABOUT)
    option(
        result, "--model", "several to choose from, the first to begin with (default: cleandift_tiny, dift_tiny, and "
        "those of Stable Diffusion 2.1 and 1.5)", nargs="+", dest="models",
    )  # fmt: skip
    result.add_argument("--download", action="store_true", help="fetch weights from the Hub when they are missing")
    result.add_argument("--host", default="127.0.0.1", help="address to listen on")
    result.add_argument("--port", type=int, help="port (default: the first free one from 7860 on)")
    result.add_argument("--memory", type=int, default=1024, metavar="MB", help="of features to keep")
    option(result, "--device")
    result.add_argument("--open", action="store_true", help="open the page in a browser")
    return result


if __name__ == "__main__":
    sys.exit(main())
