"""The page: Gradio's controls around pictures that page.js draws, over sessions and answers."""

from __future__ import annotations

import html
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Read when Gradio is imported: telemetry is disabled.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

from ..utils.errors import InputError, needs

with needs("demo"):
    import gradio as gr

from ..features.extractor import ModelError
from ..features.model_names import default_map, map_names, shown_maps
from ..visualize.feature_maps import MOST_CLUSTERS, SHOWS
from ..visualize.features import FeatureProvider
from .answers import PROBLEMS, Answers, tell_problem
from .routes import routes
from .sessions import LONGEST_PROMPT, TABS, Session, Sessions, Settings, trained_on
from .views import stage_view, tray_view

HERE = Path(__file__).parent
MODELS = ("cleandift_tiny", "dift_tiny", "cleandift_sd21", "cleandift_sd15", "dift_sd21", "dift_sd15")
NOT_UNDERSTOOD = "That was not understood; load the page again."
TITLE = "What diffusion features see"
FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica", "Arial", "sans-serif"]
MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]


class Page:
    """One page for all visitors.

    Args:
        models: names that may be chosen, the first to begin with.
        memory: bytes of features to keep.
        device: where to compute.

    Raises:
        ModelError: a model that does not exist.
    """

    def __init__(self, models: Sequence[str] = MODELS, memory: int = 1 << 30, device: str = "cpu"):
        self.features = FeatureProvider(memory, device)
        self.maps = {model: map_names(model) for model in models}
        for model in models:  # cards are read now, not while a visitor waits
            trained_on(model)
        self.answers = Answers(self.features)
        self.sessions = Sessions(lambda session: self.features.store.forget(session.token))
        self.blocks = self._build()

    # --- what happens -----------------------------------------------------------------------------------------------

    def act(
        self, model: str, map: str, prompt: str, mutual_only: bool, maps: list[str], show: str, shared: bool,
        clusters: float, timestep: float, ensemble_size: float, event: gr.EventData, request: gr.Request,
    ) -> list:  # fmt: skip
        """One action of a visitor, answered at once: by the result, or by how far the work for it is."""
        started = time.perf_counter()
        action = _action(event)
        asking = action.get("kind") in ("poll", "stop")  # neither begins anything
        session = self.sessions.of(request.session_hash, begin=not asking)
        with session.lock:
            new = not session.version
            opening = action.get("kind") == "load" or action.get("tab") == TABS[0]  # in whichever order they come
            if new and not opening:
                session.tell("This page was away for long, and what was added to it is gone.")
            if not asking:
                session.begin_action()
            answer = None
            try:
                _apply(session, action)
                session.settings = self._settings(
                    session.settings, tab=session.tab, model=model, map=map, prompt=prompt, mutual_only=mutual_only,
                    maps=maps, show=show, shared=shared, clusters=clusters, timestep=timestep,
                    ensemble_size=ensemble_size,
                )  # fmt: skip
                if session.pictures:
                    answer = self.answers.get(session, begin=not asking)
            except PROBLEMS as error:
                tell_problem(session, error)
            view = stage_view(session, answer, time.perf_counter() - started)
            same = asking or (action.get("kind") in ("point", "select") and not new)
            tray = gr.skip() if same else tray_view(session)
            return [tray, *(view if tab == session.settings.tab else gr.skip() for tab in TABS)]

    def change_model(self, model: str, map: str, maps: list[str]) -> list:
        """Which maps there are to choose from; what was chosen stays, if the new model has it. And what it knows."""
        names = self.maps[model]
        kept = [name for name in maps if name in names] or shown_maps(model, names)
        return [gr.Dropdown(names, value=map if map in names else default_map(model, names)),
                gr.CheckboxGroup(names, value=kept), _knowledge(model)]  # fmt: skip

    def close(self, request: gr.Request) -> None:
        """The page was closed."""
        self.sessions.close(request.session_hash)

    def _settings(self, before: Settings, **said: Any) -> Settings:
        """What the controls say. One that says nothing, as it is not drawn yet or was emptied, has its last value."""
        said = vars(before) | {name: value for name, value in said.items() if value is not None}
        if said["model"] not in self.maps:
            raise ModelError(f"{said['model']!r} is not among the models of this page")
        try:
            said |= {name: int(said[name]) for name in ("clusters", "timestep", "ensemble_size")}
            said |= dict(maps=[*said["maps"]], prompt=said["prompt"].strip())
        except (AttributeError, TypeError, ValueError, OverflowError) as error:
            raise InputError(NOT_UNDERSTOOD) from error
        if said["tab"] == "maps" and not said["maps"]:
            raise InputError("No map is chosen: tick one or more.")
        names = self.maps[said["model"]]
        if said["map"] not in names:  # the model was changed a moment ago
            said["map"] = default_map(said["model"], names)
        kept = tuple(name for name in names[::-1] if name in said["maps"])
        said["maps"] = kept or tuple(shown_maps(said["model"], names))
        return Settings(**said | {name: bool(said[name]) for name in ("mutual_only", "shared")})

    # --- how it looks -----------------------------------------------------------------------------------------------

    def _build(self) -> gr.Blocks:
        first = next(iter(self.maps))
        names = self.maps[first]
        shown = shown_maps(first, names)
        with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=False, delete_cache=(60, 60)) as blocks:
            gr.HTML(
                f"<h1>{TITLE}</h1><p>Click a point in any picture: where it is found again in the others lights up. "
                "Then look at the maps themselves, and at what noise does to them.</p>",
                elem_classes="lead", apply_default_css=False,
            )  # fmt: skip
            with gr.Row(elem_classes="controls"):
                with gr.Column(scale=3, min_width=320):
                    tray = _drawn("tray")
                with gr.Column(scale=2, min_width=320):
                    with gr.Row():
                        model = gr.Dropdown(list(self.maps), value=first, label="Model", scale=3, min_width=160)
                        map = gr.Dropdown(names, value=default_map(first, names), label="Map", scale=2, min_width=100)
                    knowledge = gr.HTML(_knowledge(first), elem_id="knowledge", apply_default_css=False)
                    prompt = gr.Textbox(
                        "", label="Prompt", placeholder="none, or what the pictures show: cat face", max_lines=1,
                        max_length=LONGEST_PROMPT,
                    )  # fmt: skip
            with gr.Tabs():
                with gr.Tab("Match", id=TABS[0]) as match_tab:
                    mutual_only = gr.Checkbox(
                        label="Only mutual nearest neighbours", elem_classes="flat", container=False
                    )
                    match_stage = _drawn("match")
                with gr.Tab("Maps", id=TABS[1]) as maps_tab:
                    with gr.Row(elem_classes="controls"):
                        show = gr.Radio(
                            [("PCA colours", SHOWS[0]), ("Segments", SHOWS[1]), ("Foreground", SHOWS[2])],
                            value=SHOWS[0], label="Show", min_width=260,
                        )  # fmt: skip
                        with gr.Column(min_width=180, visible=False) as clustering:
                            clusters = _slider(2, MOST_CLUSTERS, 6, label="Segments (k-means)", elem_id="clusters")
                    maps = gr.CheckboxGroup(names, value=shown, label="Maps, fine to coarse", elem_id="which-maps")
                    shared = gr.Checkbox(True, label="One basis for all pictures", elem_classes="flat", container=False)
                    maps_stage = _drawn("maps")
                with gr.Tab("Clean against noisy", id=TABS[2]) as compare_tab:
                    with gr.Row(elem_classes="controls"):
                        timestep = _slider(0, 999, Settings.timestep, label="Noise: timestep t", elem_id="timestep")
                        count = Settings.ensemble_size
                        ensemble_size = _slider(1, 16, count, label="Noises averaged", elem_id="ensemble")
                    compare_stage = _drawn("compare")
            stages = [match_stage, maps_stage, compare_stage]
            controls = [model, map, prompt, mutual_only, maps, show, shared, clusters, timestep, ensemble_size]
            at_once = dict(
                fn=self.act, inputs=controls, outputs=[tray, *stages], queue=False, show_progress="hidden",
                trigger_mode="multiple", api_visibility="private",
            )  # fmt: skip
            blocks.load(**at_once)
            model.input(
                self.change_model,
                [model, map, maps],
                [map, maps, knowledge],
                queue=False,
                show_progress="hidden",
                api_visibility="private",
            ).then(**at_once)
            for drawn in (tray, *stages):
                drawn.act(**at_once)
            show.change(
                lambda chosen: gr.Column(visible=chosen == "segments"), show, clustering, queue=False,
                show_progress="hidden", api_visibility="private",
            )  # fmt: skip
            for control in (map, mutual_only, maps, show, shared):
                control.input(**at_once)
            for slider in (clusters, timestep, ensemble_size):  # by hand, by keys, by a number
                slider.input(**at_once | dict(trigger_mode="always_last"))
            gr.on([prompt.submit, prompt.blur], **at_once)
            for tab in (match_tab, maps_tab, compare_tab):
                tab.select(**at_once)
            blocks.unload(self.close)
        return blocks

    def launch(self, host: str | None = None, port: int | None = None, **kwargs: Any) -> str:
        """Starts the server and returns its address.

        Args:
            host: None: GRADIO_SERVER_NAME, or 127.0.0.1.
            port: None: GRADIO_SERVER_PORT, or the first free one from 7860 on.
            **kwargs: for `gradio.Blocks.launch`.
        """
        scripts = ((HERE / name).read_text(encoding="utf-8") for name in ("page.js", "tray.js"))
        head = "".join(f"<script>{script}</script>" for script in scripts)
        theme = gr.themes.Default(
            primary_hue="indigo", neutral_hue="zinc", font=FONTS, font_mono=MONO, radius_size="md"
        ).set(  # white on indigo 500 has too little contrast
            button_primary_background_fill="*primary_600",
            button_primary_background_fill_hover="*primary_700",
            button_primary_background_fill_dark="*primary_600",
            button_primary_background_fill_hover_dark="*primary_700",
        )  # system fonts: nothing is fetched from another host
        _, address, _ = self.blocks.launch(
            server_name=host, server_port=port, share=False, quiet=True, footer_links=[], run_history=False,
            enable_monitoring=False, ssr_mode=False, pwa=False, mcp_server=False, max_file_size=0, theme=theme,
            head=head, css_paths=HERE / "page.css", app_kwargs=dict(routes=routes(self.sessions)), **kwargs,
        )  # fmt: skip
        return address


def _knowledge(model: str) -> str:
    """A line of HTML: what the model was trained on, if that is known."""
    known = trained_on(model)
    return f"<p>Trained on {html.escape(known)}.</p>" if known else ""


def _slider(low: int, high: int, value: int, **kwargs: Any) -> gr.Slider:
    """One whose box may be typed into: each digit is sent, and "12" begins with a 1, which may be less than `low`."""
    slider = gr.Slider(low, high, value, step=1, min_width=220, buttons=[], **kwargs)
    slider.preprocess = lambda said: None if said is None else min(max(said, low), high)
    return slider


def _drawn(kind: str) -> gr.HTML:
    """A part of the page that page.js draws."""
    return gr.HTML(
        None, html_template='<div class="drawn"></div>', apply_default_css=False, elem_id=kind,
        js_on_load=f"lookAtFeatures.{'tray' if kind == 'tray' else 'stage'}(element, props, watch, "
        "(data) => trigger('act', data));",
    )  # fmt: skip


def _action(event: gr.EventData) -> dict:
    """What the visitor did: from page.js a dict with its kind, from Gradio's own controls nothing more."""
    if isinstance(event.target, gr.Tab):
        return dict(kind="tab", tab=event.target.id)
    if isinstance(event.target, gr.Blocks):
        return dict(kind="load")
    return event._data if isinstance(event._data, dict) else {}


def _apply(session: Session, action: dict) -> None:
    """Does what the visitor did. Whatever a browser may send, it does one of these or nothing."""
    try:
        match action.get("kind"):
            case "tab" if action["tab"] in TABS:
                session.tab = action["tab"]
            case "point":
                session.add_point(str(action["picture"]), float(action["x"]), float(action["y"]))
            case "select":
                session.select_point(int(action["number"]) - 1)
            case "unpoint":
                session.remove_point(int(action["number"]) - 1)
            case "clear":
                session.clear_points()
            case "sample":
                session.add_sample(str(action["name"]))
            case "remove":
                session.remove_picture(str(action["picture"]))
            case "stop":
                session.stop()
    except (KeyError, TypeError, ValueError, OverflowError):
        session.tell(NOT_UNDERSTOOD, True)
