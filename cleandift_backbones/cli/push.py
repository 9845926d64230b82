"""`cleandift push`: a native folder becomes a repository on the Hub."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ..utils.guard import guard, importing
from .arguments import command_parser

ABOUT = """
Afterwards anyone loads it with timm.create_model("hf-hub:USER/REPO", pretrained=True, features_only=True), once
cleandift_backbones is imported. The folder is one that `cleandift convert` or `cleandift finetune` wrote. Log in first
(`hf auth login`), or set HF_TOKEN. If the upload is interrupted, run the command again: what has arrived is not sent
twice.
"""
EXAMPLES = [
    ("runs/cat_features/native me/cat-features --private", "a training's result, for oneself"),
    ("sd21 me/sd21-features --tag v1", "a converted folder, with a tag"),
]


@guard("the same command continues; files that have arrived are not sent twice")
def main(arguments: Sequence[str] | None = None) -> int:
    """Uploads. See `utils.guard.guard` for exit codes."""
    options = parser().parse_args(arguments)
    with importing():
        from ..publish.push import push_to_hub
    url = push_to_hub(options.folder, options.repo_id, options.private, options.message, options.tag, options.revision)
    print(f"pushed {options.folder} to {options.repo_id}: {url}")
    name = options.repo_id + (f"@{options.revision}" if options.revision else "")
    print(f'load it with timm.create_model("hf-hub:{name}", pretrained=True, features_only=True)')
    return 0


def parser() -> argparse.ArgumentParser:
    """All options."""
    result = command_parser("push", EXAMPLES, ABOUT)
    result.add_argument("folder", help="native folder: model.safetensors (or shards), config.json, README.md")
    result.add_argument("repo_id", metavar="USER/REPO", help="repository on the Hub; created if need be")
    result.add_argument("--private", action="store_true", help="make a new repository private")
    result.add_argument("--message", help="of the commit (default: Add ARCHITECTURE)")
    result.add_argument("--tag", help="put a tag on the commit")
    result.add_argument("--revision", help="branch to push to, created if need be (default: main)")
    return result


if __name__ == "__main__":
    sys.exit(main())
