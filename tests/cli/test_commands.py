"""How commands end: errors, Ctrl-C, SIGTERM and closed pipes are one sentence each, at any moment."""

import ast
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from cleandift_backbones.utils import errors, guard
from cleandift_backbones.utils.atomic import write_text
from tools import demo

ROOT = Path(__file__).parents[2]
SCRIPTS = [*ROOT.glob("tools/*.py"), *ROOT.glob("tools/tiny/*.py")]
TOOLS = sorted(path.stem for path in SCRIPTS if "__main__" in path.read_text())
SAMPLES = ROOT / "cleandift_backbones/assets/samples"
ARGUMENTS = {  # of work that takes a while
    "app": ["--port", "7990"],
    "benchmark": ["inference", "--model", "cleandift_tiny", "--size", "512", "--repeat", "50"],
    "compare_encoders": ["cleandift_tiny", "cleandift_tiny+tiny", "--data", SAMPLES, "--rounds", "1000"],
    "convert": ["cleandift_tiny", "--out", "native"],
    "demo": ["--out", "demo"],
    "evaluate": ["noise", "--model", "dift_tiny", "--data", SAMPLES, "--noises", "500", "--out", "results"],
    "extract": ["--model", "cleandift_tiny", "--data", SAMPLES, "--out", "features", "--size", "512"],
    "finetune": [ROOT / "configs/finetune/cleandift_tiny.yaml", f"data.path={SAMPLES}", "output_dir=run", "device=cpu"],
    "make_pictures": ["--out", "emoji"],
    "make_scenes": ["--out", "scenes", "--train", "100000"],
    "pack_pictures": ["--photos", SAMPLES, "--out", "packed"],
    "push_to_hub": ["folder", "me/model"],
    "train_latent_encoder": ["--data", SAMPLES, "--out", "light"],
    "train_teacher": ["--data", "emoji", "--vae", "vae", "--out", "teacher"],
    "train_tiny": ["--packed", "packed", "--vae", "vae", "--out", "tiny"],
    "train_vae": ["--data", "emoji", "--out", "vae"],
}


def start(tool, folder, *arguments, **kwargs):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, str(next(path for path in SCRIPTS if path.stem == tool)), *map(str, arguments)],
        cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        **kwargs,
    )  # fmt: skip


def when_guarded(process, or_ended=False):
    """Waits until SIGTERM has a handler: the first statement of a tool has run."""
    for _ in range(3000):
        status = Path(f"/proc/{process.pid}/status").read_text()
        (caught,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
        if int(caught, 16) >> (signal.SIGTERM - 1) & 1:
            return
        if or_ended and process.poll() is not None:  # at once, as without gradio
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    raise AssertionError("no handler")


def interrupted(process, number=signal.SIGINT, count=1, at_exit=False):
    """Sends a signal to the whole process group, as a terminal does; returns what was printed to stderr.

    `at_exit`: main may have ended just before, and the interpreter that shuts down has no handlers any more.
    """
    for _ in range(count):
        os.killpg(process.pid, number)
        time.sleep(0.05)
    try:
        process.printed, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode in ((128 + number, -number) if at_exit else (128 + number,)), said
    assert "Traceback" not in said and "Exception ignored" not in said, said
    return said


def test_every_tool_is_known():
    assert set(ARGUMENTS) == set(TOOLS)


@pytest.mark.parametrize("tool", ["extract", "evaluate", "finetune"])
def test_ctrl_c_during_imports(tool, tmp_path):
    process = start(tool, tmp_path, *ARGUMENTS[tool])
    when_guarded(process)
    time.sleep(0.3)
    said = interrupted(process).splitlines()
    assert said[-1] == f"{tool}.py: stopped while starting; nothing was written"
    assert len(said) == 1 + (tool == "finetune") and not list(tmp_path.iterdir())


def test_ctrl_c_during_the_imports_of_a_subcommand(tmp_path):
    words = [sys.executable, "-m", "cleandift_backbones", "extract", *map(str, ARGUMENTS["extract"])]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(words, cwd=tmp_path, env=environment, start_new_session=True, **pipes)
    when_guarded(process)
    time.sleep(0.3)
    assert interrupted(process) == "cleandift extract: stopped while starting; nothing was written\n"


@pytest.mark.slow
@pytest.mark.parametrize("tool", TOOLS)
def test_ctrl_c_at_any_moment(tool, tmp_path):
    """In the imports, while models are loaded, and at work; twice in a row, too."""
    for delay, number, count in ((0.3, 2, 2), (2, 2, 1), (5, 2, 2), (12, 15, 1)):
        process = start(tool, tmp_path, *ARGUMENTS[tool])
        when_guarded(process, or_ended=True)
        try:
            process.wait(delay)
        except subprocess.TimeoutExpired:
            said = interrupted(process, number, count, at_exit=True)
            if process.returncode > 0:  # a training stops after its step, and prints that
                printed = process.printed
                assert f"{tool}.py: stopped" in said or "\nstopped " in printed, (said, printed)
        else:  # nothing to do, or nothing to do it with
            _, said = process.communicate()
            assert process.returncode in (0, 2) and "Traceback" not in said, said


# --- the guard itself ---


def run(body):
    """A script of the guard whose main is `body`, run."""
    code = "import os, signal, sys, time\nfrom cleandift_backbones.utils.guard import guard\n"
    code += '@guard("finished files are kept")\ndef main(arguments=None):\n'
    code += "".join(f"    {line}\n" for line in body.splitlines())
    return subprocess.run(
        [sys.executable, "-c", code + "sys.exit(main())\n"],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize(
    "body, code, said",
    [
        ("return 0", 0, ""),
        (
            "from cleandift_backbones.utils import errors\nraise errors.InputError('size 3: give 64 or more')",
            2, "-c: error: size 3: give 64 or more\n",
        ),
        ("os.kill(os.getpid(), signal.SIGINT); time.sleep(9)", 130, "-c: stopped; finished files are kept\n"),
        ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)", 143, "-c: stopped; finished files are kept\n"),
        (
            "try:\n    os.kill(os.getpid(), signal.SIGINT); time.sleep(9)\n"
            "finally:\n    os.kill(os.getpid(), signal.SIGINT); time.sleep(9)",
            130, "-c: stopped; finished files are kept\n",
        ),
        (  # where Python would print the exception and go on
            "class Last:\n    def __del__(self):\n        os.kill(os.getpid(), signal.SIGINT); time.sleep(0.1)\n"
            "Last()\ntime.sleep(9)", 130, "-c: stopped; finished files are kept\n",
        ),
    ],
)  # fmt: skip
def test_how_a_command_ends(body, code, said):
    found = run(body)
    assert (found.returncode, found.stderr) == (code, said)


def test_other_exceptions_are_not_hidden():
    found = run("raise ValueError('a fault of this package')")
    assert found.returncode == 1 and "Traceback" in found.stderr


def test_a_reader_that_leaves():
    """`| head`, for much text and for little."""
    for body in ("for i in range(100000): print(i)", "time.sleep(0.2); print(1)"):
        read, write = os.pipe()
        os.close(read)
        code = "import sys, time\nfrom cleandift_backbones.utils.guard import guard\n"
        code += "@guard('')\ndef main(arguments=None):\n"
        process = subprocess.run(
            [sys.executable, "-c", f"{code}    {body}\nsys.exit(main())"],
            env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=write, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        os.close(write)
        assert process.stderr == "" and process.returncode in (0, 141)


def test_in_another_program_nothing_is_left_behind():
    """Called from Python, a command changes no handler for good, and ends with SystemExit."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), sys.unraisablehook

    @guard.guard("")
    def main(arguments=None):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(9)

    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 143
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), sys.unraisablehook)


# --- what becomes an error of this package ---


def test_file_errors_name_the_file(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(errors.MissingFileError, match="missing does not exist"), errors.file_errors("other"):
        (tmp_path / "missing").read_bytes()
    with pytest.raises(errors.FileTakenError, match="file: File exists"), errors.file_errors(file):
        file.mkdir()
    with (
        pytest.raises(errors.FileError, match="out: No space left on device; free space") as caught,
        errors.file_errors("out"),
    ):
        raise OSError(28, "No space left on device")
    assert caught.value.errno == 28
    with pytest.raises(errors.FileError, match="file"):
        write_text(file / "below", "text")


def test_a_full_disk(tmp_path, capsys):
    """The operating system refuses to write more than 20 kB to a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        with pytest.raises(SystemExit) as stop:
            demo.main(["--out", str(tmp_path / "out"), "--model", "pixels", "--device", "cpu"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    text = capsys.readouterr().err
    assert stop.value.code == 2 and "out/matches_" in text and "File too large; " in text, text
    assert not [path for path in (tmp_path / "out").rglob("*") if path.name.endswith(".part")]


def test_memory_errors_say_what_to_lower():
    for error in (
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("DataLoader worker (pid 17) is killed by signal: Killed."),
    ):
        with pytest.raises(errors.OutOfMemoryError, match="lower --size"), errors.resource_errors("lower --size"):
            raise error
    with pytest.raises(RuntimeError, match="another"), errors.resource_errors("lower --size"):
        raise RuntimeError("another fault")


class Broken(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise errors.InputError("a.png: no image")


def test_errors_of_data_workers_come_without_their_traceback():
    loader = torch.utils.data.DataLoader(Broken(), num_workers=1)
    with pytest.raises(errors.InputError, match=r"\Aa.png: no image\Z"), errors.resource_errors(""):
        next(iter(loader))


# --- the source ---

ALLOWED = {"NotImplementedError", "AssertionError", "StopIteration", "KeyboardInterrupt", "SystemExit"}
PROTOCOL = {"AttributeError": "__getattr__", "IndexError": "__getitem__"}  # what Python itself asks for


def raised(tree):
    """(line, name, innermost function) of each builtin exception that is raised by name."""
    builtin = {
        name for name in dir(__import__("builtins")) if name.endswith(("Error", "Exception", "Interrupt", "Exit"))
    }
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    caught = {  # where it is raised already
        (node, name.id)
        for block in ast.walk(tree)
        if isinstance(block, ast.Try)
        for handler in block.handlers
        for name in ast.walk(handler.type or ast.Pass())
        if isinstance(name, ast.Name)
        for statement in block.body
        for node in ast.walk(statement)
        if isinstance(node, ast.Raise)
    }
    for block in ast.walk(tree):  # `file_errors` and `reading` catch OSErrors
        if isinstance(block, ast.With):
            calls = {ast.unparse(item.context_expr).partition("(")[0] for item in block.items}
            if calls & {"file_errors", "reading"}:
                caught |= {(node, "OSError") for node in ast.walk(block) if isinstance(node, ast.Raise)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and node.exc is not None:
            name = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            if isinstance(name, ast.Name) and name.id in builtin and (node, name.id) not in caught:
                inside = [f for f in functions if f.lineno <= node.lineno <= f.end_lineno]
                yield node.lineno, name.id, max(inside, key=lambda f: f.lineno).name if inside else ""


def test_errors_are_those_of_this_package():
    """Nothing is raised that `except CleanDIFTError` would not catch."""
    found = []
    for path in [*ROOT.glob("cleandift_backbones/**/*.py"), *ROOT.glob("tools/**/*.py"), ROOT / "hubconf.py"]:
        for line, name, function in raised(ast.parse(path.read_text())):
            if name not in ALLOWED and PROTOCOL.get(name) != function:
                found.append(f"{path.relative_to(ROOT)}:{line} raises {name}")
    assert not found, "\n".join(found)


def commands():
    """(path, tree) of every file with a command."""
    for path in [*SCRIPTS, *ROOT.glob("cleandift_backbones/cli/*.py")]:
        tree = ast.parse(path.read_text())
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
            yield path, tree


def test_every_command_ends_alike():
    """Its main is guarded, and catches nothing itself."""
    for path, tree in commands():
        (main,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
        assert any("guard(" in ast.unparse(decorator) for decorator in main.decorator_list), path
        assert not any(isinstance(node, ast.ExceptHandler) for node in ast.walk(main)), path
    assert len(list(commands())) >= 15


LIGHT = {"cleandift_backbones.utils.guard"}
LIGHT_COMMANDS = {"app", "convert", "demo", "finetune", "push"}  # tests/utils/test_imports.py looks at what they import


def test_nothing_heavy_is_imported_before_the_guard():
    for path in SCRIPTS:
        if "__main__" not in path.read_text():
            continue
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                for name in names:
                    light = name.split(".")[0] in sys.stdlib_module_names or name in LIGHT
                    assert light or name.removeprefix("cleandift_backbones.cli.") in LIGHT_COMMANDS, f"{path}: {name}"
