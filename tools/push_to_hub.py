#!/usr/bin/env python
"""Publishes a native folder on the Hugging Face Hub.

    python tools/push_to_hub.py runs/cat_features me/cat-features --private

Afterwards anyone loads it with `timm.create_model("hf-hub:me/cat-features", pretrained=True, features_only=True)`, once
cleandift_backbones is imported. The folder is one that tools/convert.py wrote. Log in first
(`hf auth login`), or set HF_TOKEN. If the upload is interrupted, run the command again: what has arrived is not sent
twice.
"""

from __future__ import annotations

import argparse
import sys

from cleandift_command import guard, importing

with importing(__name__):
    from cleandift_backbones.publish.push import push_to_hub


@guard("the same command continues; files that have arrived are not sent twice")
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="native folder: model.safetensors (or shards), config.json, README.md")
    parser.add_argument("repo_id", metavar="USER/REPO", help="repository on the Hub; created if need be")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--message", help="of the commit (default: Add ARCHITECTURE)")
    parser.add_argument("--tag", help="put a tag on the commit")
    parser.add_argument("--revision", help="branch to push to, created if need be (default: main)")
    options = parser.parse_args(arguments)
    url = push_to_hub(options.folder, options.repo_id, options.private, options.message, options.tag, options.revision)
    print(f"pushed {options.folder} to {options.repo_id}: {url}")
    name = options.repo_id + (f"@{options.revision}" if options.revision else "")
    print(f'load it with timm.create_model("hf-hub:{name}", pretrained=True, features_only=True)')
    return 0


if __name__ == "__main__":
    sys.exit(main())
