"""What goes wrong or is meant ill, in headless Chromium: the page says so, and goes on."""

import time

import pytest
from app_browser import ROOT, Visitor, expect, until
from PIL import Image

pytest_plugins = ["app_browser"]  # its fixtures
pytestmark = pytest.mark.slow


def test_numbers_that_there_are_not_are_the_nearest_ones(visitor):
    """A number box says each digit as it is typed: 12 begins with a 1, which is too few segments."""
    visitor.open("Maps", "maps")
    visitor.after("maps", visitor.page.get_by_role("radio", name="Segments").click)
    number = visitor.page.locator("#clusters input[type=number]")
    number.fill("")
    number.press_sequentially("12", delay=300)
    visitor.answered("maps", "clusters=12")
    visitor.open("Clean against noisy", "compare")
    number = visitor.page.locator("#timestep input[type=number]")
    number.fill("1200")
    visitor.answered("compare", "timestep=999")
    number.press("Tab")
    expect(number).to_have_value("999")
    number.fill("-5")
    visitor.answered("compare", "timestep=0")


def test_an_answer_that_is_overtaken_changes_nothing(visitor):
    held = []

    def hold(route):
        if '"sample"' not in route.request.post_data or held:
            return route.continue_()
        held.append(route)
        held.append(route.fetch())

    visitor.page.route("**/run/predict", hold)
    visitor.page.get_by_role("button", name="Samples").click()
    samples = visitor.page.locator("#tray .samples")
    samples.get_by_title("bus, noto", exact=True).click()
    until(lambda: visitor.page.wait_for_timeout(50) or len(held) == 2, "the first answer")
    visitor.after("match", samples.get_by_title("bus, fluentflat", exact=True).click)
    assert visitor.pictures()[3:] == ["bus, noto", "bus, fluentflat"]
    held[0].fulfill(response=held[1])
    visitor.page.wait_for_timeout(1000)
    assert visitor.pictures()[3:] == ["bus, noto", "bus, fluentflat"]


def test_each_of_many_uploads_is_told_of(visitor, tmp_path):
    (tmp_path / "large.png").write_bytes(b"0" * (65 << 20))
    Image.new("RGB", (90, 90), "green").save(tmp_path / "good.png")
    visitor.upload(tmp_path / "large.png", tmp_path / "good.png")
    expect(visitor.page.locator("#tray .status.wrong")).to_have_text("large.png: larger than 64 MB; shrink it first")
    assert visitor.pictures()[-1] == "good.png"


def test_an_answer_that_was_lost_on_the_way_is_asked_for_again(visitor, server):
    lost = []

    def lose(route):
        if '"poll"' not in route.request.post_data or lost:
            return route.continue_()
        lost.append(route.request.url)
        route.fulfill(status=502)

    visitor.page.route("**/run/predict", lose)
    with server.hold("forward"):
        visitor.page.get_by_role("tab", name="Clean against noisy").click()
        visitor.slide("timestep", 77)
        until(lambda: visitor.page.wait_for_timeout(50) or lost, "a poll")
    visitor.settled("compare")
    visitor.problems[:] = [p for p in visitor.problems if "502" not in p]


def test_missing_weights_say_how_to_get_them(visitor):
    visitor.page.get_by_label("Model", exact=True).click()
    visitor.page.get_by_role("option", name="cleandift_sd21", exact=True).click()
    visitor.page.wait_for_selector("#match .notice.error:not([hidden])")
    sentence = "The weights of cleandift_sd21 are not on this machine: choose another model."
    assert visitor.notice().splitlines() == [sentence, "How to get them"]  # the rest is folded away
    visitor.page.locator("#match .notice summary").click()
    assert "cleandift convert cleandift_sd21 --out FOLDER" in visitor.notice()
    visitor.page.get_by_label("Model", exact=True).click()
    visitor.after("match", visitor.page.get_by_role("option", name="cleandift_tiny", exact=True).click)


def test_nothing_of_the_file_system_can_be_read(server):
    for path in (
        f"/gradio_api/file={ROOT}/README.md", "/gradio_api/file=/etc/passwd", "/file=/etc/passwd",
        "/gradio_api/file=http://127.0.0.1/", "/gradio_api/proxy=http://127.0.0.1/", "/samples/..%2f..%2fNOTICE",
        "/samples/pairs.json", "/pictures/x/..%2f..%2fREADME.md", "/gradio_api/runs", "/gradio_api/info",
        "/gradio_api/deep_link?session_hash=x", "/gradio_api/custom_component/a/client/component/b",
        "/gradio_api/stream/x/0/1/playlist-file", "/gradio_api/openapi.json",
    ):  # fmt: skip
        assert server.status(path) in (403, 404), path
    for path in ("upload", "component_server", "vibe-starter-queries/", "process_recording", "reset", "queue/join/x"):
        assert server.status(f"/gradio_api/{path}", "POST") == 404, path


def test_visitors_do_not_see_each_other_and_uploads_go_with_the_page(browser, server, tmp_path):
    Image.new("RGB", (90, 90), "purple").save(tmp_path / "secret.png")
    one, two = Visitor(browser, server), Visitor(browser, server)
    one.upload(tmp_path / "secret.png")
    one.click(0, 0.5, 0.5)
    two.click(1, 0.2, 0.2)
    assert one.pictures()[-1] == "secret.png" and len(two.pictures()) == 3
    assert one.page.locator("#match .chip").count() == two.page.locator("#match .chip").count() == 2
    assert one.marks(0)[2] != two.marks(0)[2]
    address = one.page.locator("#tray .strip .thumb .save").last.get_attribute("href")
    (_, token, key), other = (
        address.split("/"),
        two.page.locator("#tray .save").last.get_attribute("href").split("/")[1],
    )
    assert server.answers("/" + address) and token != other and server.status(f"/pictures/{other}/{key}") == 404
    assert not [p for p in server.log.parent.joinpath("temp").rglob("*") if p.is_file()]  # nothing went to the disk
    one.leave()
    until(lambda: server.status("/" + address) == 404, "the upload to be gone")
    two.click(1, 0.3, 0.3)  # the other visitor stays
    two.leave()


def test_clicks_outside_set_no_point_and_the_keyboard_does(visitor):
    visitor.page.locator("#match figcaption").first.click()
    visitor.page.locator("#match .points").click(position=dict(x=600, y=5))
    time.sleep(0.5)
    assert visitor.page.locator("#match .chip").count() == 1
    visitor.view(0).focus()
    for key in ("ArrowLeft", "ArrowUp", "ArrowUp"):
        visitor.page.keyboard.press(key)
    visitor.after("match", lambda: visitor.page.keyboard.press("Enter"))
    assert visitor.marks(0)[2] == pytest.approx((0.46, 0.42), abs=0.01)
    assert visitor.view(0).evaluate("view => view === document.activeElement")  # the next one needs no search
