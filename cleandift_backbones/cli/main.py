"""The command `cleandift`: finds the subcommand, imports its file alone, and calls it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from types import ModuleType

from ..utils.errors import DependencyError
from ..utils.guard import guard, importing, subcommand
from ..version import __version__
from .arguments import COMMANDS, Formatter, example_text

EXAMPLES = [
    ("demo --data cat.jpg dog.jpg --out figures", "points of one image, found in another"),
    ("extract --model cleandift_sd21 --map us6 --data photos --out features", "features of a folder of images"),
    ("finetune cleandift_tiny --data emoji --out runs/tiny", "a training by a packaged config"),
]


@guard("nothing was written")
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a subcommand. See `utils.guard.guard` for exit codes.

    Args:
        arguments: of the command line; None: those of this process.

    Returns:
        The exit code.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] in COMMANDS:
        name = given[0]
        with subcommand(name):
            code = load(name).main(given[1:])
            return code if isinstance(code, int) else 0
    options = parser().parse_args(given)
    if options.print_completion:
        print(completion(options.print_completion))
        return 0
    parser().print_help()
    return 0


def load(name: str) -> ModuleType:
    """The file of a subcommand."""
    with importing():
        return import_module(f".{name}", __package__)


def parser() -> argparse.ArgumentParser:
    """Options of `cleandift` itself; subcommands are listed, and their options are not read here."""
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:{width}}  {summary}" for name, summary in COMMANDS.items())
    result = argparse.ArgumentParser(
        prog="cleandift",
        usage="cleandift COMMAND ...\n       cleandift COMMAND --help",
        description=f"Features of clean images from diffusion models, as backbones for timm.\n\ncommands:\n{listed}",
        epilog=example_text("cleandift", EXAMPLES),
        formatter_class=Formatter,
    )
    result.add_argument("command", nargs="?", type=_unknown, metavar="COMMAND", help=argparse.SUPPRESS)
    result.add_argument("--version", action="version", version=__version__, help="print the version of this package")
    result.add_argument(
        "--print-completion", choices=("bash", "zsh", "tcsh"), help="print a script that completes this command's words"
    )
    return result


def _unknown(word: str) -> str:
    near = get_close_matches(word, COMMANDS, 1)
    hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(COMMANDS)}"
    raise argparse.ArgumentTypeError(f"there is no command {word!r}; {hint}")


def completion(shell: str) -> str:
    """The completion script of a shell, by shtab.

    Raises:
        DependencyError: shtab is not installed.
    """
    try:
        import shtab
    except ImportError as error:
        raise DependencyError(f"{error}; --print-completion needs shtab: pip install shtab") from error

    def built(prog: str, **_: object) -> argparse.ArgumentParser:
        name = prog.split()[-1]
        with subcommand(name):
            return load(name).parser()

    whole = argparse.ArgumentParser(prog="cleandift")
    commands = whole.add_subparsers(parser_class=built)
    for name, summary in COMMANDS.items():
        commands.add_parser(name, help=summary)
    return shtab.complete(whole, shell)


if __name__ == "__main__":
    sys.exit(main())
