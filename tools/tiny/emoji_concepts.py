"""Emoji concepts for make_pictures.py: their names, the families of near-duplicates, and the split by family."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path

from cleandift_backbones.utils.atomic import write_text
from cleandift_backbones.utils.errors import CleanDIFTError

EVALUATION = Path(__file__).resolve().parents[2] / "cleandift_backbones" / "evaluation"
SPLIT_FILE, EYES_FILE = EVALUATION / "emoji_split.json", EVALUATION / "emoji_eyes.json"
SPLIT_SEED, HELDOUT_SHARE, LARGEST_FAMILY = "cleandift-emoji-1", 0.17, 8

GROUPS_DROPPED = {"component", "symbols", "flags"}
KEYS_DROPPED = {"1F4AF", "1F4A4", "2660", "2663", "2665", "2666"}  # 100, ZZZ, the card suits
OLD_NAMES = {"dizzy-face": "1F635", "hugging-face": "1F917"}  # Unicode has renamed these since


class PictureError(CleanDIFTError):
    """Something the user can put right; the message says how."""


def read_json(path: Path):
    """The contents of a JSON file; PictureError when it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PictureError(f"cannot read {path}: {error}; fetch the package again") from None


def to_key(code_points: str) -> str:
    """'2764-fe0f-200d-1f525' -> '2764-200D-1F525'."""
    return "-".join(part for part in code_points.upper().split("-") if part != "FE0F")


def slug(name: str) -> str:
    """'man: red hair' -> 'man-red-hair', the form of the icon sets' names."""
    plain = unicodedata.normalize("NFKD", name.lower()).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


def read_concepts(folder: Path) -> dict[str, dict[str, str]]:
    """Key -> {"text", "subgroup"} of every emoji that is kept (skin tones are nested in the data and not read)."""
    tables = read_json(folder / "meta" / "groups.json")
    concepts = {}
    for entry in read_json(folder / "en" / "data.json"):
        key = to_key(entry["hexcode"])
        if "group" not in entry or tables["groups"][str(entry["group"])] in GROUPS_DROPPED or key in KEYS_DROPPED:
            continue  # no group: a regional indicator
        concepts[key] = {"text": entry["label"], "subgroup": tables["subgroups"][str(entry["subgroup"])]}
    return concepts


# Nearly one drawing under several code points: a line's members always go to the same side of the split.
SAME = """
1F9D1 1F468 1F469 1F9D4 1F471 | 1F385 1F936 1F9D1-200D-1F384 | 1F934 1F478 1FAC5 | 1F57A 1F483 | 1F930 1FAC3 1FAC4
1F470 1F935 | 1F931 1F9D1-200D-1F37C | 1F46F 1F9D1-200D-1F430
1F46A 1F46B 1F46C 1F46D 1F48F 1F491 1F9D1-200D-1F91D-200D-1F9D1 | 1F408 1F408-200D-2B1B
1F415 1F415-200D-1F9BA 1F9AE | 1F43B 1F43B-200D-2744 | 1F426 1F426-200D-2B1B | 1F34B 1F34B-200D-1F7E9
1F344 1F344-200D-1F7EB | 1F648 1F649 1F64A | 1F424 1F425
2764 1F9E1 1F49B 1F49A 1FA75 1F499 1F49C 1F90E 1F5A4 1FA76 1F90D 1FA77 | 1F493 1F497 1F496 1F49E | 1F30D 1F30E 1F30F
1F4D5 1F4D7 1F4D8 1F4D9 1F4D4 | 1F4EA 1F4EB 1F4EC 1F4ED | 1F507 1F508 1F509 1F50A | 1F512 1F513 1F50F 1F510
1F50D 1F50E | 1F693 1F694 | 1F695 1F696 | 1F697 1F698 | 1F68C 1F68D | 1F50B 1FAAB | 1F514 1F515 | 1F4F1 1F4F2
1F4E4 1F4E5 | 1F4C8 1F4C9 | 1F4B4 1F4B5 1F4B6 1F4B7 | 1F4C5 1F4C6 | 1F311 1F312 1F313 1F314 1F315 1F316 1F317 1F318
1F31A 1F31D | 1F31B 1F31C | 231B 23F3 | 1F4C1 1F4C2 | 1F4F7 1F4F8 | 1F3E0 1F3E1 | 1F3E3 1F3E4
26C5 1F324 1F325 1F326 | 1F446 1F447 1F448 1F449 261D 1FAF5 | 1F91B 1F91C | 1FAF1 1FAF2 | 1FAF7 1FAF8 | 1F44D 1F44E
1F91A 270B 1F590 | 1F442 1F9BB | 1F600 1F603 1F604 | 263A 1F60A | 1F641 2639 | 1F642 1F642-200D-2194 1F642-200D-2195
1F62E 1F62F | 1F626 1F627 | 1F621 1F620 | 1F636 1F636-200D-1F32B | 1F608 1F47F | 1F947 1F948 1F949 1F3C5
1F63A 1F638 1F431 | 1F619 1F617 | 1F684 1F685 | 1F37A 1F37B | 1F4C3 1F4C4 | 1F4BF 1F4C0 | 1F332 1F384 | 1F306 1F307
1F304 1F305 | 1F4D2 1F4D3 | 1F6EB 1F6EC | 1F374 1F37D | 1F5A8 1F4E0
"""
ADULT = {"1F468": "1F9D1", "1F469": "1F9D1", "1F466": "1F9D2", "1F467": "1F9D2", "1F474": "1F9D3", "1F475": "1F9D3"}


def family(key: str) -> str:
    """The key that stands for all near-duplicates of `key` (gender, skin, hair, direction, couples, SAME)."""
    parts = [ADULT.get(part, part) for part in key.split("-")]
    parts = [part for part in parts if not re.fullmatch(r"1F3F[B-F]|1F9B[0-3]|2640|2642|27A1|200D", part)]
    people = {"1F9D1", "1F9D2", "1F9D3"}
    if sum(part in people for part in parts) > 1 or (len(parts) > 1 and set(parts) <= people):
        return "1F46A"
    base = "-200D-".join(parts)
    if re.fullmatch(r"1F55[0-9A-F]|1F56[0-7]", base):
        return "1F550"  # the 24 clock faces
    return _same().get(base, base)


@functools.cache
def _same() -> dict[str, str]:
    table: dict[str, str] = {}
    for line in re.split(r"[|\n]", SAME.strip()):
        members = line.split()
        if again := table.keys() & set(members):
            raise AssertionError(f"{again} stands twice in SAME")
        table.update(dict.fromkeys(members, members[0]))
    return table


def make_split(concepts: dict[str, dict[str, str]], styles_of: dict[str, set[str]], annotated: set[str]) -> dict:
    """Choose about 300 held-out concepts, family by family, in the order of a seeded hash; every subgroup takes part.

    Families with eye marks go first, until half of a subgroup's marked concepts are held out; then every subgroup is
    filled up to HELDOUT_SHARE of its concepts. Families above LARGEST_FAMILY, or with no concept in two styles, are for
    training. `concepts`: see read_concepts; `styles_of`: key -> the styles that draw it; `annotated`: keys with eyes.
    """
    members, by_subgroup = defaultdict(list), defaultdict(list)
    for key in sorted(styles_of):
        members[family(key)].append(key)
    for name in sorted(members, key=lambda name: hashlib.sha256(f"{SPLIT_SEED}/{name}".encode()).hexdigest()):
        subgroup, _ = Counter(concepts[key]["subgroup"] for key in members[name]).most_common(1)[0]
        by_subgroup[subgroup].append(name)
    heldout: set[str] = set()
    for names in by_subgroup.values():
        usable = [n for n in names if any(len(styles_of[key]) > 1 for key in members[n])]
        usable = [n for n in usable if len(members[n]) <= LARGEST_FAMILY]
        total = sum(len(members[n]) for n in names)
        marked = Counter({n: len(annotated.intersection(members[n])) for n in names})
        taken = taken_marked = 0
        for marked_ones in (True, False):
            for name in usable:
                if bool(marked[name]) is not marked_ones:
                    continue
                if marked_ones:
                    wanted = 2 * taken_marked < sum(marked.values())
                else:
                    wanted = taken < max(1, round(HELDOUT_SHARE * total))
                if wanted:
                    heldout.update(members[name])
                    taken, taken_marked = taken + len(members[name]), taken_marked + marked[name]
    return {
        "about": "Split of the emoji concepts, made by `tools/tiny/make_pictures.py --make-split` "
        f"(seed {SPLIT_SEED!r}): all pictures of a concept, in every style, and of its near-duplicates (in gender, "
        "skin, hair, direction, couples, colours) are on one side. Keys: Unicode code points, hyphenated, no FE0F.",
        "heldout": sorted(heldout),
        "train": sorted(set(styles_of) - heldout),
    }


def read_split() -> dict[str, str]:
    """Key -> "train" or "heldout", from the split file that ships with the package."""
    split = read_json(SPLIT_FILE)
    return {key: side for side in ("train", "heldout") for key in split[side]}


def write_json(path: Path, data: dict) -> None:
    """Write a dictionary as JSON, a line per entry, aside and then renamed."""
    lines = []
    for name, value in data.items():
        if isinstance(value, dict):
            body = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in value.items())
            lines.append(f"{json.dumps(name)}: {{\n{body}\n}}")
        else:
            lines.append(f"{json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}")
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")
