#!/usr/bin/env python3
"""Starts a page in the browser where one sees the features: click a point, find it in other pictures.

    python tools/app.py                                     the small model and sample pictures, offline
    python tools/app.py --models cleandift_sd21 dift_sd21   Stable Diffusion's, if their weights are on this machine
    python tools/app.py --models local-dir:runs/mine/native weights of yours: a folder that tools/finetune.py left, or
                                                            that tools/convert.py made of a file
    python tools/app.py --models resnet50 hf-hub:USER/REPO  any timm model, any repository

Needs the extra: pip install "cleandift_backbones[demo]". Nothing is sent anywhere, and nothing is fetched from another
host; only --download lets weights be fetched from the Hub. Uploaded pictures stay in memory, and go when their page
closes.
"""

from __future__ import annotations

import argparse
import logging
import os
import socket
import sys
import threading

from cleandift_command import guard, importing


@guard("the page is closed, and uploaded images are gone")
def main(arguments: list[str] | None = None) -> None:
    args = _parser().parse_args(arguments)
    if not args.download:  # read when huggingface_hub is imported
        os.environ["HF_HUB_OFFLINE"] = "1"
    logging.getLogger("timm").setLevel(logging.ERROR)
    with importing(__name__):
        from cleandift_backbones.app.page import MODELS, Page
        from cleandift_backbones.utils.errors import InputError, file_errors
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", metavar="NAME", help="models to choose from, the first to begin with (default: "
        "cleandift_tiny, dift_tiny, and those of Stable Diffusion 2.1 and 1.5)",
    )  # fmt: skip
    parser.add_argument("--download", action="store_true", help="fetch weights from the Hub when they are missing")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, help="port (default: the first free one from 7860 on)")
    parser.add_argument("--memory", type=int, default=1024, metavar="MB", help="of features to keep (default: 1024)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... or auto (default)")
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    return parser


if __name__ == "__main__":
    sys.exit(main())
