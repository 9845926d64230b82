"""Generated bad input: whatever comes, a result or a CleanDIFTError that names the file; never another error.

Valid inputs of all kinds (`fuzz_targets`) are cut, flipped, doubled, renamed, encoded otherwise, and changed as JSON.
"""

import json
import shutil
import warnings
from pathlib import Path

import hypothesis.strategies as st
import pytest
from fuzz_targets import Target, targets
from hypothesis import HealthCheck, given, settings

from cleandift_backbones.utils.errors import CleanDIFTError

TARGETS = targets()
FAST, SLOW = 200, 10_000  # examples in all, at least
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["", "../x", "/", "a" * 5000, "\ud800", "\x00", "é\u2028", -1, 2**70, 1e400, float("nan")])
)  # fmt: skip
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
NAMES = st.sampled_from(
    [
        "x",
        "x.png",
        "x.tar",
        "x.json",
        "x.txt",
        ".hidden",
        "a b",
        "ü.jpg",
        "[1].png",
        "x.safetensors",
        "no/x",
        "metadata.csv",
    ]
)


@st.composite
def changed_json(draw, value):
    """A JSON value with one node, at any depth, replaced, deleted or renamed."""
    root = json.loads(json.dumps(value))
    parent, key, node = None, None, root
    while isinstance(node, (dict, list)) and node and (parent is None or draw(st.integers(0, 3))):
        parent, key = node, draw(st.sampled_from(list(node) if isinstance(node, dict) else range(len(node))))
        node = parent[key]
    how = draw(st.sampled_from(["replace", "delete", "rename"]))
    if parent is None:
        return draw(VALUES)
    if how == "replace":
        parent[key] = draw(VALUES)
    elif how == "delete" or isinstance(parent, list):
        del parent[key]
    else:
        parent[draw(st.text(max_size=5))] = parent.pop(key)
    return root


def header_of(data: bytes):
    """(header, place of the first byte behind it) of a safetensors file, or None for what is none."""
    end = 8 + int.from_bytes(data[:8], "little")
    try:
        return (json.loads(data[8:end]), end) if data[8:9] == b"{" else None
    except ValueError:
        return None


def as_json(data: bytes):
    """(values, one for each line, and what joins them again), or None for what is no JSON."""
    try:
        return [json.loads(data)], ""
    except ValueError:
        pass
    try:
        return [json.loads(line) for line in data.decode().split("\n") if line], "\n"
    except ValueError:
        return None


@st.composite
def changed_bytes(draw, data: bytes):
    """Damaged bytes. A safetensors header counts as JSON half of the time."""
    found = header_of(data)
    if found and draw(st.booleans()):
        header = json.dumps(draw(changed_json(found[0]))).encode("utf-8", "surrogatepass")
        return len(header).to_bytes(8, "little") + header + data[found[1] :]
    found = as_json(data) if data else None
    if found and draw(st.booleans()):
        values, newline = found
        number = draw(st.integers(0, len(values) - 1))
        values[number] = draw(changed_json(values[number]))
        return newline.join(map(json.dumps, values)).encode("utf-8", "surrogatepass")
    # Headers stand at the start: half of the places are there.
    end = len(data) if draw(st.booleans()) else min(len(data), 64)
    start = draw(st.integers(0, end))
    stop = draw(st.integers(start, min(len(data), start + 64)))
    how = draw(st.sampled_from(["cut", "flip", "double", "remove", "insert", "twice", "encode", "number"]))
    if how == "cut":
        return data[:start]
    if how == "flip":
        bit = 1 << draw(st.integers(0, 7))
        return data[:start] + bytes([data[start] ^ bit]) + data[start + 1 :] if start < len(data) else data
    if how == "double":
        return data[:stop] + data[start:]
    if how == "remove":
        return data[:start] + data[stop:]
    if how == "insert":
        return data[:start] + draw(st.binary(max_size=16)) + data[start:]
    if how == "number":  # a field of four bytes, as sizes and counts are
        return data[:start] + draw(st.sampled_from([b"\xff" * 4, b"\x00" * 4, b"\x7f\xff\xff\xff"])) + data[start + 4 :]
    if how == "twice":
        return data + data
    words = data.decode("utf-8", "replace")
    return words.encode(draw(st.sampled_from(["utf-16", "utf-8-sig", "utf-32", "cp1252"])), "replace")


@st.composite
def damage(draw, target: Target) -> dict[str, bytes | None]:
    """The files of a damaged input; None stands for a folder in the place of a file."""
    files = dict(target.files)
    for _ in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from(target.names))
        if files.get(name) is None:
            continue
        how = draw(st.sampled_from(["bytes"] * 8 + ["rename", "delete", "copy", "swap", "folder"]))
        if how == "bytes":
            files[name] = draw(changed_bytes(files[name]))
        elif how == "folder":
            files[name] = None
        elif how == "swap":
            files[name] = files[draw(st.sampled_from(sorted(files)))]
        else:
            data = files[name] if how == "copy" else files.pop(name)
            if how != "delete":
                files[str(Path(name).parent / draw(NAMES))] = data
    return files


def lay(folder: Path, files: dict[str, bytes | None]) -> None:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if data is None:
            path.mkdir(exist_ok=True)
        else:
            path.write_bytes(data)


def examples(name: str, total: int) -> int:
    """How many of `total` examples this kind gets: fewer where one takes long, and at least its equal part in all."""
    parts = {other: 1 / target.cost for other, target in TARGETS.items()}
    return -int(-total * parts[name] // sum(parts.values()))


def attempt(name: str, total: int, root: Path) -> int:
    """Tries a kind of input; returns the number of examples."""
    target, counted, outcomes = TARGETS[name], 0, []

    @settings(
        max_examples=examples(name, total), derandomize=True, database=None, deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(damage(target))
    def one(files):
        nonlocal counted
        counted += 1
        folder = root / f"{counted % 7}" / "input"
        shutil.rmtree(folder, ignore_errors=True)
        lay(folder, files)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                target.read(folder)
            outcomes.append("read")
        except CleanDIFTError as error:
            outcomes.append("refused")
            named = [str(folder), *(Path(name).name for name in {**files, **target.files})]
            assert any(word in str(error) for word in named), f"no file is named: {error}"

    one()
    print(f"{name}: {counted} examples, {outcomes.count('refused')} refused")
    assert total < SLOW or set(outcomes) == ({"read", "refused"} if target.refuses else {"read"})
    return counted


@pytest.mark.parametrize("name", TARGETS)
def test_valid_inputs_are_read(name, tmp_path):
    lay(tmp_path, TARGETS[name].files)
    TARGETS[name].read(tmp_path)


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_inputs_are_read_or_refused(name, tmp_path):
    attempt(name, FAST, tmp_path)


@pytest.mark.slow
def test_ten_thousand_damaged_inputs(tmp_path, capsys):
    with capsys.disabled():
        counts = {name: attempt(name, SLOW, tmp_path) for name in TARGETS}
        print(f"{sum(counts.values())} examples of {len(counts)} kinds of damaged input")
    assert sum(counts.values()) >= SLOW
