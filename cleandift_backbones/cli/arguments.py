"""What the parsers of all subcommands share: their summaries, the look of --help, and options that mean one thing.

`option` adds an option of `SHARED`: the same name, metavar and first words of help in every subcommand.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence

from ..utils.guard import program

#: each subcommand with its summary, in the order of --help; the file of the same name holds `parser` and `main`
COMMANDS = {
    "demo": "draw what features match, for the sample images or your own",
    "app": "serve a page on this machine on which features are seen and compared",
    "models": "list the models: maps, sizes, licences, where weights come from",
    "extract": "compute the features of many images once, and store them",
    "evaluate": "measure feature maps on the paper's tasks, for any timm model",
    "finetune": "distil a clean student (CleanDIFT) from a noisy teacher",
    "convert": "convert weights between timm's, diffusers' and LDM's formats",
    "push": "publish a native folder on the Hugging Face Hub",
    "version": "print the versions of this package and of what it uses, and the device",
}

#: option -> spellings of earlier versions, which stay accepted but are not shown; keyword arguments of `add_argument`
SHARED: dict[str, tuple[tuple[str, ...], dict]] = {
    "--data": (("--images",), dict(metavar="PATH", help="input images")),
    "--out": ((), dict(metavar="PATH", help="output")),
    "--model": (("--models",), dict(metavar="NAME", help="timm model name")),
    "--map": (("--maps",), dict(nargs="+", metavar="MAP", help="maps by name or index, with spaces or commas")),
    "--timesteps": (("--timestep",), dict(metavar="T", help="timesteps of the denoiser, 0..999")),
    "--weights": ((), dict(metavar="FILE", help="safetensors instead of the model's published weights")),
    "--device": ((), dict(metavar="NAME", default="auto", help="cpu, cuda, cuda:1, ... or auto")),
    "--dtype": ((), dict(metavar="DTYPE", help="floating-point type of the model")),
}

MODELS_HELP = "'pixels' is the image itself, random:NAME has random weights"  # where several models are compared


class Formatter(argparse.HelpFormatter):
    """Keeps the lines of texts that have several, and shows defaults where there are any."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        nothing = action.default in (None, False, argparse.SUPPRESS) or action.default == []
        if nothing or action.help is None or "default" in action.help:
            return action.help
        shown = " ".join(map(str, action.default)) if isinstance(action.default, list | tuple) else "%(default)s"
        return f"{action.help} (default: {shown})"


def command_parser(
    command: str,
    examples: Sequence[tuple[str, str]],
    about: str = "",
    kind: type[argparse.ArgumentParser] = argparse.ArgumentParser,
) -> argparse.ArgumentParser:
    """The parser of a subcommand, without options.

    Args:
        command: one of `COMMANDS`.
        examples: command lines without "cleandift COMMAND", each with what it does; shown at the end of --help.
        about: paragraphs between summary and options.
        kind: the class of the parser.
    """
    summary = COMMANDS[command]
    return kind(
        prog=program(),
        description="\n\n".join(filter(None, [f"{summary[0].upper()}{summary[1:]}.", textwrap.dedent(about).strip()])),
        epilog=example_text(f"cleandift {command}", examples),
        formatter_class=Formatter,
    )


def example_text(start: str, examples: Sequence[tuple[str, str]]) -> str:
    """Example commands under a headline, each below what it does."""
    return "\n".join(["examples:", *(f"  # {what}\n  {start} {words}".rstrip() for words, what in examples)])


def option(container: argparse._ActionsContainer, name: str, about: str = "", **kwargs) -> argparse.Action:
    """Adds an option of `SHARED` to a parser or a group, and its earlier spellings.

    Args:
        about: what follows the shared help.
        kwargs: of `add_argument`, over the shared ones.
    """
    hidden, shared = SHARED[name]
    shared = {**shared, **kwargs, "help": "; ".join(filter(None, [kwargs.get("help", shared["help"]), about]))}
    if "choices" in shared:
        shared.pop("metavar", None)
    action = container.add_argument(name, **shared)
    also(container, action, *hidden)
    return action


def also(container: argparse._ActionsContainer, action: argparse.Action, *names: str) -> None:
    """Other spellings of an option, which are accepted and not shown."""
    for name in names:
        container._option_string_actions[name] = action
