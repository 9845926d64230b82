"""Visitors of the page, without a browser: what they have, the work done for them, what handlers and addresses take."""

import io
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from picture_bytes import encoded
from PIL import Image

from cleandift_backbones.app.answers import Answers, Job, Progress
from cleandift_backbones.app.sessions import MOST_PICTURES, MOST_POINTS, Session, Sessions, Settings
from cleandift_backbones.features.extractor import ModelError
from cleandift_backbones.visualize.features import FeatureProvider


def photo(shade=0, size=(80, 80)):
    return encoded(Image.new("RGB", size, (shade, 90, 200)))


def test_a_session_takes_what_fits_and_says_what_does_not():
    session = Session()
    key = session.pictures[0].key
    for x, words in ((1.2, "outside the picture"), (float("nan"), "outside the picture")):
        session.add_point(key, x, 0.5)
        assert words in session.take_notice()[0] and len(session.points) == 1
    session.add_point("../../etc/passwd", 0.5, 0.5)
    assert session.take_notice() == ("That picture is no longer here.", True)
    session.add_sample("../emoji_eyes.json")
    assert session.take_notice() == ("There is no such sample.", True)
    for _ in range(MOST_POINTS):
        session.add_point(key, 0.5, 0.5)
    assert len(session.points) == MOST_POINTS and "the selected one moved" in session.take_notice()[0]
    assert not session.add_upload(b"no", "../../evil.txt") and session.take_notice()[0].startswith(
        "evil.txt: not an image"
    )
    assert session.add_upload(photo(1), "me.png") and session.add_upload(photo(2), "C:\\me.png")
    assert [p.name for p in session.pictures[-2:]] == ["me.png", "me_2.png"]
    long = f"{'x' * 200}.png"
    assert session.add_upload(photo(3), long) and session.pictures[-1].name == f"{'x' * 80}.png"
    assert not session.add_upload(photo(2), "other.png") and "already here" in session.take_notice()[0]
    assert session.add_upload(photo(4), "10.30\u202fAM\u202e\n.png")  # as macOS names its screenshots
    assert session.pictures[-1].name == "10.30\u202fAM.png"
    while len(session.pictures) < MOST_PICTURES:
        session.add_upload(photo(len(session.pictures)), "more.png")
    for shade in (99, 98, 97):
        assert not session.add_upload(photo(shade), "more.png")
    assert session.take_notice()[0].count("remove one first") == 1
    session.remove_picture(key)
    assert session.points == [] and session.selected == 0


def test_points_follow_their_pictures():
    session = Session()
    _, second, third = (p.key for p in session.pictures)
    session.add_point(third, 0.1, 0.2)
    session.add_point(second, 0.3, 0.4)
    session.select_point(1)
    session.remove_picture(second)
    assert session.numbered_points() == [(0, 0.19, 0.17), (1, 0.1, 0.2)] and session.selected == 1
    session.add_point(third, 0.5, 0.6)
    session.select_point(1)
    session.remove_point(0)
    assert session.points == [(third, 0.1, 0.2), (third, 0.5, 0.6)] and session.selected == 0  # still the same one
    session.remove_point(0)
    assert session.points == [(third, 0.5, 0.6)] and session.selected == 0


def test_visitors_have_their_own_and_leave_nothing(features):
    gone = []
    sessions = Sessions(gone.append)
    one, two = sessions.of("one"), sessions.of("two")
    one.add_upload(photo(), "secret.png")
    assert len(two.pictures) == 3 and one.token != two.token and sessions.with_token(one.token) is one
    sessions.close("one")
    assert gone == [one] and sessions.with_token(one.token) is None and one.closed
    assert sessions.of("one") is not one and len(sessions) == 2


# --- answers ---------------------------------------------------------------------------------------------------------


def finish(answers, session):
    """Asks until the answer is no progress."""
    for _ in range(6000):
        with session.lock:
            answer = answers.get(session)
        if not isinstance(answer, Progress):
            return answer
        time.sleep(0.01)
    raise AssertionError("no answer in a minute")


def test_answers_come_at_once_after_work(features):
    answers, session = Answers(features), Session()
    session.settings = Settings("maps", show="segments", maps=("us6",))
    assert isinstance(answers.get(session), Progress)
    result = finish(answers, session)
    assert result.show == "segments" and answers.get(session) is result
    session.settings = Settings("match")
    assert answers.get(session).found.shape == (1, 3, 2)
    assert session.result.function == "match" and session.work is None
    features.store.forget(session.token)


def test_answers_come_though_nothing_can_be_kept():
    """A memory too small for one picture: each answer is computed anew."""
    answers, session = Answers(FeatureProvider(memory=1000)), Session()
    for _ in range(2):
        assert isinstance(answers.get(session), Progress)
        assert len(finish(answers, session).points) == 1 and answers.features.store.size == 0


class SlowFeatures(FeatureProvider):
    """Waits before every picture until it may go on, and looks whether it is still wanted."""

    def __init__(self):
        super().__init__()
        self.go, self.begun = threading.Event(), []

    def compute(self, spec, pictures, owner=None, watch=None):
        self.begun.append(spec)
        while not self.go.wait(0.01):
            watch(0.5, "computing features")
        return super().compute(spec, pictures, owner, watch)


def test_work_shows_progress_and_can_be_stopped():
    slow = SlowFeatures()
    answers, session = Answers(slow), Session()
    for _ in range(3):  # further wishes while busy wait for the first
        assert isinstance(answers.get(session), Progress)
        time.sleep(0.05)
    assert len(slow.begun) == 1 and answers.get(session).share == 0.5
    session.cancelled.set()
    assert finish(answers, session) is None and session.work is None
    assert session.take_notice() == ("Stopped. Change anything, or click, to go on.", False)
    assert answers.get(session) is None and len(slow.begun) == 1  # asking alone does not begin again
    session.given_up = None
    session.stop()  # too late, or once more: there is nothing to stop, and nothing begins
    assert answers.get(session, begin=False) is None and session.work is None and not session.take_notice()[1]
    session.begin_action()
    slow.go.set()
    assert finish(answers, session) is not None


def test_what_changes_while_busy_is_what_comes():
    """Points set while busy are answered too; another noise is computed instead of the first."""
    slow = SlowFeatures()
    answers, session = Answers(slow), Session()
    answers.get(session)
    with session.lock:
        session.add_point(session.pictures[1].key, 0.5, 0.5)
        session.add_point(session.pictures[2].key, 0.4, 0.4)
        session.settings = Settings("match", "dift_tiny", timestep=5)
        assert isinstance(answers.get(session), Progress)
    slow.go.set()
    result = finish(answers, session)
    assert result.spec.model == "dift_tiny" and len(result.points) == 3
    assert [spec.model for spec in slow.begun] == ["cleandift_tiny", "dift_tiny"]


def test_work_ends_when_what_is_wanted_now_cannot_be_had():
    slow = SlowFeatures()
    answers, session = Answers(slow), Session()
    answers.get(session)
    work = session.work
    with session.lock:
        session.settings = Settings("compare", "dift_tiny")  # which has no noisy twin
        with pytest.raises(ModelError, match="no noisy twin"):
            answers.get(session)
    work.join(60)
    assert not work.is_alive() and session.work is None and not slow.go.is_set()


def test_maps_that_take_long_are_drawn_by_the_work(features, monkeypatch):
    """Whether few, at once, or many, with progress and Stop: the result is the same."""
    shown = []
    for limit in (dict(), dict(QUICK_PRODUCTS=1), dict(QUICK_MAPS=1)):
        for name, value in limit.items():
            monkeypatch.setattr(f"cleandift_backbones.app.answers.{name}", value)
        for tab in ("maps", "compare"):
            answers, session = Answers(features), Session()
            session.settings = Settings(tab, maps=("us6", "us9"), timestep=50, ensemble_size=1)
            result = finish(answers, session)
            assert answers.get(session) is result or tab == "compare"
            assert session.remembers(tab, Job(session.settings, tuple(session.pictures)).key)
            shown.append(result.encoded(".png"))
            features.store.forget(session.token)
    assert len(set(shown[::2])) == len(set(shown[1::2])) == 1


def test_an_unforeseen_error_is_told_and_logged(caplog, monkeypatch):
    answers, session = Answers(FeatureProvider()), Session()
    monkeypatch.setattr(answers.features, "compute", lambda *args: 1 / 0)
    assert finish(answers, session) is None
    assert session.take_notice() == ("This went wrong (ZeroDivisionError); the server's log says more.", True)
    assert "division by zero" in caplog.text


def test_closing_a_page_stops_its_work_and_leaves_no_features():
    slow = SlowFeatures()
    sessions = Sessions(lambda session: slow.store.forget(session.token))
    answers, session = Answers(slow), sessions.of("page")
    answers.get(session)
    work = session.work
    sessions.close("page")
    slow.go.set()
    work.join(60)
    assert not work.is_alive() and len(slow.store) == 0
    assert answers.get(session) is None and session.work is None  # a click that came in late
    assert not session.add_upload(photo(), "late.png")


# --- the page's handlers ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page():
    pytest.importorskip("gradio", reason="needs the extra [demo]")
    from cleandift_backbones.app.page import Page

    return Page(["cleandift_tiny", "dift_tiny", "cleandift_sd21", "pixels"])


CONTROLS = dict(
    model="cleandift_tiny", map="us6", prompt="", mutual_only=False, maps=["us6"], show="pca", shared=True, clusters=6,
    timestep=261, ensemble_size=8,
)  # fmt: skip


def act(page, visitor="v", _data=None, **controls):
    """One action, its work done: the tray and the open tab as the browser gets them."""
    request = SimpleNamespace(session_hash=visitor)
    tray = None
    for _ in range(6000):
        event = SimpleNamespace(target=None, _data=_data)
        new_tray, *stages = page.act(**CONTROLS | controls, event=event, request=request)
        tray = tray or new_tray
        (view,) = (stage for stage in stages if "kind" in stage)
        if not view["busy"]:
            return tray, view
        _data = dict(kind="poll")
        time.sleep(0.01)
    raise AssertionError("no answer in a minute")


def test_page_answers_clicks(page):
    tray, view = act(page, _data=dict(kind="load"))
    assert len(tray["pictures"]) == 3 and view["notice"] == "" and len(view["panels"]) == 3
    key = view["pictures"][1]["key"]
    _, view = act(page, _data=dict(kind="point", picture=key, x=0.4, y=0.6))
    assert [p["number"] for p in view["points"]] == [1, 2] and view["selected"] == 1
    assert view["panels"][key]["heat"] is None  # it shines in the others
    others = [panel for name, panel in view["panels"].items() if name != key]
    assert all(panel["heat"].startswith("data:image/webp") and len(panel["marks"]) == 2 for panel in others)


def test_a_page_that_is_gone_comes_back_by_an_action_not_by_asking(page):
    """A poll on its way when the page closes leaves no visitor behind; a telephone that wakes goes on by a click."""
    act(page, "gone", dict(kind="load"))
    page.close(SimpleNamespace(session_hash="gone"))
    count = len(page.sessions)
    for kind in ("poll", "stop"):
        _, view = act(page, "gone", dict(kind=kind))
        assert view["pictures"] == []  # no address would lead to them
        assert "was away for long" in view["notice"] and "recipe" not in view and len(page.sessions) == count
    tray, view = act(page, "gone", dict(kind="point", picture=Session().pictures[0].key, x=0.5, y=0.5))
    assert tray["token"] == view["token"] and len(tray["pictures"]) == len(view["pictures"]) == 3
    assert "was away for long" in view["notice"] and view["recipe"] and len(page.sessions) == count + 1


@pytest.mark.parametrize(
    "data",
    ["text", 5, [1], dict(kind="point"), dict(kind="point", picture=None, x="a", y={}), dict(kind="select", number="x"),
     dict(kind="select", number=float("inf")), dict(kind="point", picture="x", x=10**400, y=0),
     dict(kind="tab", tab="../x"), dict(kind="sample", name="../../NOTICE"), dict(kind="point", picture="x", x=9, y=9)],
)  # fmt: skip
def test_page_takes_anything_from_a_browser(page, data):
    _, view = act(page, "odd", data)
    assert view["kind"] == "match" and len(view["points"]) == 1 and view["recipe"]


def test_page_says_what_cannot_be_had(page, hub, offline):
    offline()
    _, view = act(page, "w", model="cleandift_sd21")
    told = "The weights of cleandift_sd21 are not on this machine: choose another model."
    assert view["error"] and view["notice"] == told and "recipe" not in view
    assert "cleandift convert cleandift_sd21 --out" in view["details"] and "it with --download" in view["details"]
    _, view = act(page, "w", model="pixels", prompt="cat")
    assert view["error"] and "takes no prompts" in view["notice"] and not view["details"]
    _, view = act(page, "w", dict(kind="tab", tab="compare"), model="dift_tiny")
    assert view["error"] and "choose a cleandift_* model" in view["notice"]
    _, view = act(page, "w", dict(kind="tab", tab="maps"), maps=[])
    assert view["error"] and "No map is chosen" in view["notice"]
    act(page, "w", dict(kind="tab", tab="compare"))
    _, view = act(page, "w", prompt="x" * 400)
    assert view["error"] and "too long" in view["notice"]
    for odd in (dict(timestep="x"), dict(clusters="many"), dict(maps=5), dict(prompt=5), dict(ensemble_size=1e400)):
        _, view = act(page, "w", **odd)
        assert view["error"] and view["notice"] == "That was not understood; load the page again."
    _, view = act(page, "w")
    assert not view["error"] and [side["title"] for side in view["sides"]] == ["Clean", "Noisy"]


def test_page_says_what_a_model_was_trained_on(page, tmp_path):
    lines = {
        name: page.change_model(name, "us6", ["us6"])[2] for name in ("cleandift_tiny", "cleandift_sd21", "pixels")
    }
    assert "emoji" in lines["cleandift_tiny"] and "choose cleandift_sd21" in lines["cleandift_tiny"]
    assert "photographs and art" in lines["cleandift_sd21"] and "emoji" not in lines["cleandift_sd21"]
    assert lines["pixels"] == ""
    (tmp_path / "README.md").write_text("Data: <script>alert(1)</script>")  # a stranger's card
    page.maps[f"local-dir:{tmp_path}"] = ["us6"]
    shown = page.change_model(f"local-dir:{tmp_path}", "us6", ["us6"])[2]
    assert shown == "<p>Trained on &lt;script&gt;alert(1)&lt;/script&gt;.</p>"
    del page.maps[f"local-dir:{tmp_path}"]
    html = next(c for c in page.blocks.config["components"] if c["props"].get("elem_id") == "knowledge")
    assert html["props"]["value"] == lines["cleandift_tiny"]  # that of the first model, when the page opens


def test_the_first_upload_to_a_model_of_emoji_is_warned():
    session = Session()
    session.add_upload(photo(1), "one.png")
    text, error = session.take_notice()
    assert not error and text.startswith("cleandift_tiny is trained on emoji") and "photographs are unreliable" in text
    session.begin_action()
    session.add_upload(photo(2), "two.png")
    assert session.take_notice() == ("", False)
    session = Session()
    session.settings = Settings(model="cleandift_sd21")
    session.add_upload(photo(1), "one.png")
    assert session.take_notice() == ("", False)
    session.settings = Settings(model="dift_tiny")
    session.add_upload(photo(1), "one.png")  # is here already
    assert "trained on" not in session.take_notice()[0]
    session.add_upload(photo(2), "two.png")
    assert "dift_tiny is trained on emoji" in session.take_notice()[0]


def test_a_control_that_says_nothing_has_its_last_value(page):
    """One that the browser has not drawn yet, as the prompt when the page opens, or a number that was emptied."""
    nothing = dict.fromkeys(CONTROLS)
    _, view = act(page, "n", dict(kind="load"), **nothing)
    assert not view["error"] and view["recipe"] and "prompt" not in view["recipe"]
    act(page, "n", dict(kind="tab", tab="maps"), maps=["us3"], show="segments", clusters=4)
    _, view = act(page, "n", **nothing)
    assert [column["name"] for column in view["columns"]] == ["us3"] and "4 clusters" in view["caption"]


def test_addresses_give_out_only_what_belongs_to_the_visitor(page):
    from starlette.applications import Starlette
    from starlette.testclient import TestClient

    from cleandift_backbones.app.routes import routes

    tray, view = act(page, "a", dict(kind="load"))
    client = TestClient(Starlette(routes=routes(page.sessions)))
    for shade in (6, 7):
        assert client.post(f"/uploads/{tray['token']}?name=mine ä.jpg", content=photo(shade)).json() == {}
    tray, view = act(page, "a")
    mine = tray["pictures"][-1]
    assert mine["name"] == "mine ä_2.jpg" and "'mine ä_2.jpg'" in view["recipe"]
    saved = client.get("/" + mine["file"]).headers["content-disposition"]
    assert saved == "attachment; filename*=UTF-8''mine%20%C3%A4_2.jpg"  # the name that the lines of Python give it
    assert client.get("/" + mine["url"]).headers["content-type"] == "image/jpeg"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(client.get("/" + mine["file"]).content))),
                          np.asarray(Image.open(io.BytesIO(photo(7)))))  # fmt: skip
    for kind, address in view["files"].items():
        answer = client.get("/" + address)
        assert f"filename*=UTF-8''match.{kind}" in answer.headers["content-disposition"]
    other = act(page, "b", dict(kind="load"))[0]["token"]
    for path in (f"pictures/{other}/{mine['key']}.png", f"results/{other}x/match.png", "samples/pairs.json",
                 f"pictures/{other}/%2e%2e%2f%2e%2e%2fNOTICE", "gradio_api/file=/etc/passwd", "gradio_api/upload",
                 "gradio_api/deep_link", "gradio_api/component_server", "gradio_api/custom_component/a/b/c/d",
                 "gradio_api/vibe-starter-queries/", "gradio_api/stream/a/0/1/playlist-file", "gradio_api/info",
                 f"results/{tray['token']}/maps.png", f"pictures/{tray['token']}/{mine['key']}.svg"):  # fmt: skip
        assert client.get(path).status_code == 404, path
    assert client.get("/pictures/ä/x.png").status_code == client.get("/results/%FF/match.png").status_code == 404
    assert client.post("/uploads/unknown", content=photo()).json()["error"].startswith("This page was closed")
    assert "larger than 64 MB" in client.post(f"/uploads/{other}", content=b"0" * (65 << 20)).json()["error"]
    page.close(SimpleNamespace(session_hash="a"))
    assert client.get("/" + mine["file"]).status_code == 404
