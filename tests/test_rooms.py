"""Nothing imports upwards, and no two rooms import each other: the rule of imports between folders."""

import ast
import re
from collections import Counter
from pathlib import Path

PACKAGE = "cleandift_backbones"
ROOT = Path(__file__).parents[1]
#: each room with its floor; rooms of one floor may import each other in one direction
FLOORS = {
    **dict.fromkeys(("utils", "configs"), 0),
    **dict.fromkeys(("checkpoints", "data"), 1),
    "models": 2,
    **dict.fromkeys(("optimization", "publish", "mm"), 3),
    "features": 4,
    **dict.fromkeys(("evaluation", "distill", "visualize"), 5),
    **dict.fromkeys(("cli", "app"), 6),
}
ALIASES = {"extractor", "extraction", "hub", "convert", "errors", "allocator"}  # nothing of the package imports them
OUTSIDE = {
    "__main__": "cli",
    "mm_checks": "mm",
    "registry": "mm",
    "version": "utils",
}  # modules of the root: the room that they belong to


def imports(path):
    """Dotted names, below the package, of all modules and names that a file imports from it."""
    here = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = [*here[: len(here) - node.level]] if node.level else []
            base += node.module.split(".") if node.module else []
            if base[0] == PACKAGE:
                for alias in node.names:
                    yield (*base[1:], alias.name)


def rooms():
    """{(room, room that it imports): places}"""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        name = path.relative_to(ROOT / PACKAGE).with_suffix("").parts[0]
        room = OUTSIDE.get(name, name)
        if room == "__init__" or room in ALIASES:
            continue
        for target, *_ in imports(path):
            assert target not in ALIASES, f"{path} imports the alias {target}"
            other = OUTSIDE.get(target, target)
            if other != room:
                found.setdefault((room, other), []).append(path.relative_to(ROOT).as_posix())
    return found


def test_every_folder_is_a_room():
    assert {path.parent.name for path in (ROOT / PACKAGE).glob("*/__init__.py")} == set(FLOORS)


def test_imports_lead_down():
    up = {pair: places for pair, places in rooms().items() if FLOORS[pair[0]] < FLOORS[pair[1]]}
    assert not up


def test_no_two_rooms_import_each_other():
    pairs = rooms()
    assert not [pair for pair in pairs if pair[::-1] in pairs]


def test_the_page_lists_the_rooms_with_their_floors():
    rows = re.findall(r"^\| (\d) \| `(\w+)` \|", (ROOT / "docs/architecture.md").read_text(), re.M)
    assert {room: int(floor) for floor, room in rows} == FLOORS


def test_files_that_the_page_names_exist():
    table = (ROOT / "docs/architecture.md").read_text()
    named = set(re.findall(r"`((?:\w+/)+\w+\.py)`", table))
    assert len(named) > 12
    assert not [name for name in named if not ((ROOT / PACKAGE / name).is_file() or (ROOT / name).is_file())]


def test_files_stay_short():
    long = {p.name: n for p in (ROOT / PACKAGE).rglob("*.py") if (n := p.read_text().count("\n")) > 420}
    assert not long


def test_every_name_of_a_class_exists_once():
    """But for the backbone of mm, which mmengine's configs name like the model."""
    names = Counter()
    for path in (ROOT / PACKAGE).rglob("*.py"):
        names.update(node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef))
    assert {name for name, count in names.items() if count > 1} <= {"CleanDIFT"}
