"""What is sent to the browser: sessions and results as plain data, small pictures as data: addresses."""

from __future__ import annotations

import base64
import io

import torch
import torch.nn.functional as F
from PIL import Image

from ..visualize import figures
from ..visualize.comparison import Comparison, Side
from ..visualize.feature_maps import Maps
from ..visualize.matches import Match
from ..visualize.pictures import sample_names
from ..visualize.results import SUFFIXES, Result, one_thread
from .answers import Progress
from .sessions import MOST_PICTURES, Session

HEAT_SIDE = 128  # longer side of heat maps, which the browser stretches


def tray_view(session: Session) -> dict:
    """Pictures, and samples that may be added. Call with the session's lock."""
    names = [picture.name for picture in session.pictures]
    samples = [dict(name=n, title=_title(n), url=f"samples/{n}", used=n in names) for n in sample_names()]
    return dict(
        token=session.token, version=session.version, pictures=_pictures(session), most=MOST_PICTURES, samples=samples
    )  # fmt: skip


@one_thread()
def stage_view(session: Session, answer: Result | Progress | None, seconds: float) -> dict:
    """A tab. Call with the session's lock.

    Args:
        answer: what is to be shown; or how far the work for it is; or None if there is nothing to show.
        seconds: that the answer took.
    """
    session.version += 1
    text, wrong = session.take_notice()
    view = dict(
        kind=session.settings.tab, token=session.token, version=session.version, pictures=_pictures(session),
        points=_points(session), selected=session.selected, notice=text, error=wrong,
        details=session.details, busy=None,
    )  # fmt: skip
    if answer is None:
        return view
    if isinstance(answer, Progress):
        return view | dict(busy=dict(share=round(answer.share, 3), text=answer.text))
    result = answer
    if isinstance(result, Match):
        view |= dict(panels=_match_panels(result, session.selected))
        view["caption"] = f"{result.spec.model}, map {result.map}"
    elif isinstance(result, Maps):
        view |= _maps(session, result)
    elif isinstance(result, Comparison):
        view |= dict(sides=[_side(session, name, getattr(result, name)) for name in ("clean", "noisy")])
    files = {suffix[1:]: f"results/{session.token}/{result.function}{suffix}" for suffix in SUFFIXES}
    return view | dict(recipe=result.recipe(), files=files, milliseconds=round(1000 * seconds))


def _pictures(session: Session) -> list[dict]:
    return [
        dict(key=p.key, name=p.name, title=_title(p.name), note=p.note, width=p.image.width, height=p.image.height,
             url=f"pictures/{session.token}/{p.key}.jpg", file=f"pictures/{session.token}/{p.key}.png")
        for p in session.pictures
    ]  # fmt: skip


def _title(name: str) -> str:
    """A file's name for people: cat-face_noto.png -> cat face, noto."""
    return name.rpartition(".")[0].replace("-", " ").replace("_", ", ") if name in sample_names() else name


def _points(session: Session) -> list[dict]:
    names = {picture.key: _title(picture.name) for picture in session.pictures}
    colours = figures.POINT_COLOURS
    return [
        dict(number=n + 1, colour=colours[n % len(colours)], key=key, name=names[key], x=x, y=y)
        for n, (key, x, y) in enumerate(session.points)
    ]


def _match_panels(result: Match, selected: int) -> dict:
    """Per picture: marks, and for the selected point the heat and what to say of the match."""
    panels = {}
    for n, picture in enumerate(result.pictures):
        panel = panels[picture.key] = dict(marks=[], heat=None, score=None, mutual=None)
        for mark in result.marks(n):
            source = result.points[mark.number - 1][0] == n
            panel["marks"].append(
                dict(number=mark.number, colour=mark.colour, x=mark.x, y=mark.y, source=source,
                     selected=mark.number == selected + 1)
            )  # fmt: skip
        if selected < len(result.points) and result.points[selected][0] != n:
            panel["heat"] = _heat(result.heat(selected, n))
            panel["score"] = round(float(result.scores[selected, n]), 2)
            panel["mutual"] = bool(result.mutual[selected, n])
    return panels


def _maps(session: Session, result: Maps) -> dict:
    columns = []
    for name in result.maps:
        height, width = result.values[name][0].shape[:2] if result.pictures else (0, 0)
        columns.append(dict(name=name, title=f"{height} x {width}"))
    cells = session.remember("cells", result, lambda: {  # a result that is remembered is drawn once
        picture.key: [_uri(result.images[name][n]) for name in result.maps] for n, picture in enumerate(result.pictures)
    })  # fmt: skip
    return dict(columns=columns, cells=cells, caption=f"{result.spec.model}: {result.caption()}")


def _side(session: Session, name: str, side: Side) -> dict:
    spec = side.match.spec
    passes = "one pass" if spec.timestep is None else f"{spec.ensemble_size} noises, t = {spec.timestep}"
    if spec.ensemble_size == 1:
        passes = f"one noise, t = {spec.timestep}"
    images = session.remember(
        f"images {name}", side.directions, lambda: [_uri(image) for image in side.directions.images]
    )
    return dict(
        title=name.capitalize(), model=spec.model, passes=passes, seconds=round(side.seconds, 3),
        panels=_match_panels(side.match, session.selected),
        pca={picture.key: uri for picture, uri in zip(side.match.pictures, images)},
    )  # fmt: skip


def _heat(heat: torch.Tensor) -> str:
    scale = HEAT_SIDE / max(heat.shape)
    size = [max(1, round(side * scale)) for side in heat.shape]
    small = F.interpolate(heat[None, None], size, mode="bilinear", antialias=True)[0, 0].clamp(0, 1)
    return _uri(figures.heat_colours(small))


def _uri(image: Image.Image) -> str:
    """A picture as a data: address: WebP, which is small with and without transparency."""
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", quality=85, method=0)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
