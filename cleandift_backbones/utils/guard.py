"""How every command ends: one sentence for an error, for Ctrl-C and for SIGTERM, from its first import on.

This module imports the standard library alone, and so does `import cleandift_backbones`: the guard is active before
PyTorch, timm and diffusers are loaded, which takes seconds. A command of the package reads as

    @guard("finished images are stored, the same command continues")
    def main(arguments=None) -> int:
        options = parser().parse_args(arguments)
        with importing():
            import torch
        ...

and a script of tools/ puts `with importing(__name__):` around the imports at its top.
"""

from __future__ import annotations

import atexit
import functools
import os
import select
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_BROKEN_PIPE = 141  # 128 + SIGPIPE, as the shell reports other programs
_subcommand = ""  # of `cleandift`, while it runs
_from_shell = False  # whether a guarded main of this process took its arguments from sys.argv


class Terminated(KeyboardInterrupt):
    """SIGTERM. It is raised as Ctrl-C is, so that both run the same clean-up."""


@contextmanager
def subcommand(name: str) -> Iterator[None]:
    """Around a subcommand of `cleandift`: usage and messages name it."""
    global _subcommand
    former, _subcommand = _subcommand, name
    try:
        yield
    finally:
        _subcommand = former


def program() -> str:
    """The name of this command in usage and messages: "cleandift extract", or that of a script, "extract.py"."""
    return f"cleandift {_subcommand}" if _subcommand else os.path.basename(sys.argv[0])


def command_line() -> str:
    """The command of this process as it is typed, to be recorded beside results."""
    script, *words = sys.argv
    if os.path.basename(script) in ("cleandift", "cleandift.exe"):
        return shlex.join(["cleandift", *words])
    module = getattr(sys.modules["__main__"], "__spec__", None)
    started = ["-m", module.name.removesuffix(".__main__")] if module and module.origin == script else [script]
    return shlex.join(["python", *started, *words])


def _write(text: str) -> None:
    with suppress(OSError, ValueError):  # a closed stderr
        sys.stderr.write(f"{program()}: {text}\n")
        sys.stderr.flush()


def _set_handlers(handler: Callable) -> dict:
    """Sets the handler of both signals, but for those that are ignored (nohup); returns the former handlers."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    former = {number: signal.getsignal(number) for number in _SIGNALS}
    former = {number: found for number, found in former.items() if found not in (signal.SIG_IGN, None)}
    for number in former:
        signal.signal(number, handler)
    return former


def _restore(handlers: dict) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


def _leave_import(number: int, _frame: object) -> None:
    # No exception: libraries swallow those that appear in the middle of their imports, or print them.
    _write("stopped while starting; nothing was written")
    os._exit(128 + number)


def _leave(number: int, _frame: object) -> None:
    os._exit(128 + number)


def _interrupt(number: int, _frame: object) -> None:
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated


@contextmanager
def importing(name: str | None = None, message: str = "") -> Iterator[None]:
    """Around imports: Ctrl-C, SIGTERM and errors of this package end the process with one sentence.

    Where the command is called from Python, in a notebook or a test, nothing is changed.

    Args:
        name: `__name__` of a script, for the imports at its top; None inside of a guarded main.
        message: printed to stderr at once, for a command whose imports take seconds.
    """
    if not (_from_shell if name is None else name == "__main__"):
        yield
        return
    if message:
        _write(message)
    former = _set_handlers(_leave_import)
    try:
        yield
    except Exception as error:
        _report(error)
    _restore(former if _interrupt in former.values() else dict.fromkeys(former, _leave))


def guard(stopped: str) -> Callable[[Callable], Callable]:
    """Decorates `main(arguments=None) -> int | None` of a command.

    An error of this package (`errors.CleanDIFTError`) is printed as "PROG: error: ..." and exits with 2; no other
    exception is caught. Ctrl-C exits with 130, SIGTERM with 143, and a reader that closed the pipe (`| head`) with 141.

    Args:
        stopped: what was kept and how to continue, printed after Ctrl-C and SIGTERM.
    """

    def decorate(main: Callable) -> Callable:
        @functools.wraps(main)
        def run(arguments: list[str] | None = None) -> int | None:
            global _from_shell
            started_before, _from_shell = _from_shell, _from_shell or arguments is None
            if arguments is None:
                atexit.register(_set_handlers, _leave)  # a process that ends has no handlers but Python's own
            former, hook = _set_handlers(_interrupt), sys.unraisablehook
            for stream in (sys.stdout, sys.stderr):
                with suppress(AttributeError, ValueError):  # no file (a notebook), or closed
                    # A terminal of another encoding, a name that is no text: printed with \\x.., not an error.
                    stream.reconfigure(errors="backslashreplace")
            sys.unraisablehook = functools.partial(_unraisable, hook)
            try:
                return main(arguments)
            except KeyboardInterrupt as error:
                code = 128 + (signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT)
                _restore(dict.fromkeys(former, _leave))  # a second Ctrl-C leaves at once
                _write(f"stopped; {stopped}")
                sys.exit(code)
            except BrokenPipeError:
                if not _closed_pipe():
                    raise
                sys.exit(_BROKEN_PIPE)
            except Exception as error:
                _report(error)
            finally:
                _closed_pipe()  # what is still to be printed
                sys.unraisablehook = hook
                _restore(former)
                _from_shell = started_before

        return run

    return decorate


@contextmanager
def blocked(*numbers: int) -> Iterator[None]:
    """Processes and threads that are started inside never get these signals; those for this thread wait until the end.

    A terminal sends Ctrl-C to all processes of a command: without this each of them would print a traceback.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def started(loader: Iterable) -> Iterator:
    """`iter` of a DataLoader, whose processes work on until this one stops them."""
    with blocked(*_SIGNALS):
        return iter(loader)


def _report(error: Exception) -> None:
    """Exits with 2 after an error of this package; raises any other again."""
    from .errors import CleanDIFTError

    if not isinstance(error, CleanDIFTError):
        raise error
    _write(f"error: {error}")
    sys.exit(2)


def _closed_pipe() -> bool:
    """Whether stdout or stderr is a pipe without a reader; if so, what is left for it is dropped."""
    closed = False
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
            poll = select.poll()
            poll.register(stream.fileno(), select.POLLOUT)
            broken = any(event & select.POLLERR for _, event in poll.poll(0))
        except BrokenPipeError:
            broken = True
        except (OSError, ValueError, AttributeError):  # no file (a notebook, a test), closed, or no poll (Windows)
            broken = False
        if broken:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        closed = closed or broken
    return closed


def _unraisable(hook: Callable, found: sys.UnraisableHookArgs) -> None:
    """Ctrl-C that appeared in a destructor or callback, where Python drops exceptions, is sent again."""
    if issubclass(found.exc_type, KeyboardInterrupt):
        number = signal.SIGTERM if issubclass(found.exc_type, Terminated) else signal.SIGINT
        again = threading.Timer(0.01, signal.pthread_kill, (threading.main_thread().ident, number))
        again.daemon = True
        again.start()  # when this hook has returned: Python drops exceptions in it, too
    else:
        hook(found)
