"""`cleandift models`: the registered models of this package, as a table or as JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from ..utils.guard import guard, importing
from .arguments import command_parser

EXAMPLES = [("", "a table"), ("cleandift_sd21 --json", "all that is known of one model")]


@guard("nothing was written")
def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the list. See `utils.guard.guard` for exit codes."""
    options = parser().parse_args(arguments)
    with importing():
        from ..models import model_names
        from ..utils.errors import UnknownKeyError
    known = model_names()
    for name in options.names:
        if name not in known:
            raise UnknownKeyError(f"{name!r} is no model of this package; choose from {', '.join(known)}")
    found = [describe(name) for name in options.names or known]
    print(json.dumps(found, indent=1) if options.json else table(found))
    return 0


def parser() -> argparse.ArgumentParser:
    """All options."""
    result = command_parser(
        "models",
        EXAMPLES,
        """
        Maps are outputs of the UNet's blocks, numbered in order of execution: mid, us1, ..., us10; us6 is the paper's
        default. Parameters are those of VAE encoder and UNet, which is built up to the default map.
        """,
    )
    result.add_argument("names", nargs="*", metavar="NAME", help="only these models")
    result.add_argument("--json", action="store_true", help="print JSON, with channels and strides of every map")
    return result


def describe(name: str) -> dict:
    """What is known of a model, without any weights.

    Returns:
        A dict of plain values: name, architecture, kind ("clean" or "noisy"), maps (dicts of name, channels, stride;
        fine to coarse), default_map, input_size (pixels), parameters, license, trained_on, weights (part -> file or
        OWNER/NAME/PATH on the Hub), included (whether all of the weights come with the package).
    """
    from pathlib import Path

    import timm
    import torch

    from ..models.architectures import published, spec_of
    from ..models.feature_info import FeatureInfo
    from ..publish.training_data import training_data

    spec, infos, weights = spec_of(name), FeatureInfo.of(name), dict(published(name))
    wanted = spec.arch.defaults.map
    default = wanted if wanted in infos.names else infos.names[-1]
    with torch.device("meta"):
        model = timm.create_model(name, features_only=True, out_indices=[default])
    return dict(
        name=name,
        architecture=spec.arch.name,
        kind=spec.kind,
        maps=[dict(name=info["name"], channels=info["num_chs"], stride=info["reduction"]) for info in infos],
        default_map=default,
        input_size=spec.arch.image_size,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        license=timm.get_pretrained_cfg(name).license,
        trained_on=training_data(name),
        weights=weights,
        included=bool(weights) and all(Path(place).exists() for place in weights.values()),
    )


def table(found: Sequence[dict]) -> str:
    """Aligned columns, one line per model."""
    rows = [("name", "UNet", "maps", "default", "input", "parameters", "weights", "licence")]
    for one in found:
        strides = [part["stride"] for part in one["maps"]]
        rows.append((
            one["name"],
            one["architecture"],
            f"{len(strides)}, strides {min(strides)} to {max(strides)}",
            one["default_map"],
            f"{one['input_size']} px",
            f"{one['parameters'] / 1e6:.1f} M",
            "included" if one["included"] else "/".join(one["weights"].get("unet", "").split("/")[:2]),
            one["license"] or "",
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths)).rstrip() for row in rows)


if __name__ == "__main__":
    sys.exit(main())
