// Draws what the server sends, and tells it what the visitor does. Plain data in (see views.py), elements out.
window.lookAtFeatures = (() => {
  "use strict";

  // --- elements -------------------------------------------------------------------------------------------------

  const make = (tag, attributes = {}, ...children) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (name === "style") Object.entries(value).forEach(([key, v]) => element.style.setProperty(key, v));
      else if (value === true) element.setAttribute(name, "");
      else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
    }
    element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== ""));
    return element;
  };

  const percent = (share) => `${(100 * share).toFixed(3)}%`;
  const seconds = (s) => (s < 1 ? `${Math.round(1000 * s)} ms` : `${s.toFixed(s < 10 ? 1 : 0)} s`);

  const text = (element, words) => { if (element.textContent !== words) element.textContent = words; };

  // Puts elements into another in this order. What stands there already is left alone: it keeps the focus, a press of
  // the mouse that has begun, a handle that is being dragged.
  const fill = (parent, ...children) => {
    const wanted = children.flat(Infinity).filter(Boolean);
    for (const node of [...parent.childNodes]) if (!wanted.includes(node)) node.remove();
    wanted.forEach((child, n) => {
      if (parent.childNodes[n] !== child) parent.insertBefore(child, parent.childNodes[n]);
    });
    return parent;
  };

  // Parts by name, built once and changed in place; `sweep` forgets those that were not asked for since the last time.
  const keeper = () => {
    const kept = new Map();
    let used = new Set();
    const keep = (name, build) => {
      used.add(name);
      if (!kept.has(name)) kept.set(name, build());
      return kept.get(name);
    };
    keep.sweep = () => {
      for (const name of [...kept.keys()]) if (!used.has(name)) kept.delete(name);
      used = new Set();
    };
    return keep;
  };

  // --- one picture with heat, marks and a caption ------------------------------------------------------------------

  const dot = (mark) =>
    make("span", {
      class: `mark ${mark.source ? "source" : "found"}${mark.selected ? " selected" : ""}`,
      style: { left: percent(mark.x), top: percent(mark.y), "--colour": mark.colour },
      "data-number": mark.number, "data-x": mark.x, "data-y": mark.y,
    }, String(mark.number));

  const newCard = () => {
    const image = make("img", { class: "ground", draggable: "false" });
    const heat = make("img", { class: "heat", alt: "", draggable: "false" });
    const marks = make("div", { class: "marks" });
    const view = make("div", { class: "view" }, image, heat, marks);
    const caption = make("figcaption");
    const card = { figure: make("figure", { class: "card" }, view, caption), view, image, heat, marks, caption };
    const point = (x, y) => {
      if (!card.onpoint || !(x >= 0 && x <= 1 && y >= 0 && y <= 1)) return;
      marks.append(make("span", { class: "mark pending", style: { left: percent(x), top: percent(y) } }));
      card.onpoint(x, y);
    };
    view.addEventListener("click", (event) => {
      const box = view.getBoundingClientRect();
      point((event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
    });
    let cross = null; // the keyboard's way: arrows move a cross, Enter sets the point
    view.addEventListener("keydown", (event) => {
      const step = event.shiftKey ? 0.01 : 0.04;
      const moves = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
      if (!card.onpoint || !(event.key in moves || event.key === "Enter")) return;
      event.preventDefault();
      if (!cross) cross = { x: 0.5, y: 0.5, element: make("span", { class: "cross" }) };
      const [dx, dy] = moves[event.key] || [0, 0];
      cross.x = Math.min(1, Math.max(0, cross.x + dx));
      cross.y = Math.min(1, Math.max(0, cross.y + dy));
      Object.assign(cross.element.style, { left: percent(cross.x), top: percent(cross.y) });
      view.append(cross.element);
      if (event.key === "Enter") point(cross.x, cross.y);
    });
    view.addEventListener("blur", () => { if (cross) cross.element.remove(); cross = null; });
    return card;
  };

  // `src` is missing while features of a new picture are being computed: its place is empty then.
  const drawCard = (keep, name, picture, { src, alt, heat = null, marks = [], caption = [], onpoint = null }) => {
    const card = keep(`card ${name}`, newCard);
    card.onpoint = onpoint;
    card.view.style.aspectRatio = `${picture.width} / ${picture.height}`;
    card.view.classList.toggle("clickable", Boolean(onpoint));
    if (onpoint) {
      card.view.tabIndex = 0;
      card.view.setAttribute("role", "application");
      const how = "click a point, or move with the arrow keys and press Enter";
      card.view.setAttribute("aria-label", `${picture.title}: ${how}`);
    }
    card.image.style.visibility = src ? "" : "hidden";
    if (src && card.image.getAttribute("src") !== src) card.image.src = src;
    card.image.alt = alt;
    if (heat && card.heat.getAttribute("src") !== heat) card.heat.src = heat;
    card.view.classList.toggle("heated", Boolean(heat));
    card.marks.replaceChildren(...marks.map(dot));
    card.caption.replaceChildren(...caption);
    return card.figure;
  };

  // --- parts of a stage --------------------------------------------------------------------------------------------

  const notice = (keep, view) => {
    const words = keep("notice words", () => make("span"));
    const details = keep("notice details", () => make("span"));
    const folded = keep("notice folded", () =>
      make("details", {}, make("summary", {}, "How to get them"), details));
    const element = keep("notice", () => make("div", { class: "notice", role: "status" }));
    element.classList.toggle("error", Boolean(view.error));
    element.hidden = !view.notice;
    text(words, view.notice || "");
    text(details, view.details || "");
    return fill(element, words, view.details && folded);
  };

  const busy = (keep, view, act) => {
    const inside = keep("busy inside", () => make("div"));
    const bar = keep("busy bar", () =>
      make("div", { class: "bar", role: "progressbar", "aria-label": "Progress" }, inside));
    const words = keep("busy words", () => make("span"));
    const stop = keep("stop", () =>
      make("button", { type: "button", class: "stop", onclick: () => act({ kind: "stop" }) }, "Stop"));
    bar.classList.toggle("unknown", view.busy.share === 0);
    bar.setAttribute("aria-valuenow", Math.round(100 * view.busy.share));
    inside.style.width = percent(Math.max(0.02, view.busy.share));
    text(words, view.busy.text);
    return fill(keep("busy", () => make("div", { class: "busy" })), bar, words, stop);
  };

  const pointList = (keep, view, act) => {
    const chips = view.points.map((point, n) => {
      const name = keep(`chip name ${n}`, () => make("span"));
      const choose = keep(`chip button ${n}`, () =>
        make("button", { type: "button", title: "Show where this point is found",
          onclick: () => act({ kind: "select", number: n + 1 }) }, make("b", {}, String(n + 1)), name));
      const chip = keep(`chip ${n}`, () =>
        make("span", { class: "chip" }, choose,
          make("button", { type: "button", class: "remove", "aria-label": `Remove point ${n + 1}`,
            onclick: () => act({ kind: "unpoint", number: n + 1 }) }, "×")));
      chip.classList.toggle("selected", n === view.selected);
      choose.setAttribute("aria-pressed", String(n === view.selected));
      chip.style.setProperty("--colour", point.colour);
      text(name, point.name);
      return chip;
    });
    const clear = keep("clear", () =>
      make("button", { type: "button", class: "plain", onclick: () => act({ kind: "clear" }) }, "Clear all"));
    const hint = keep("hint", () => make("span", { class: "hint" }, "Click a point in any picture."));
    return fill(keep("points", () => make("div", { class: "points" })), chips.length ? [chips, clear] : hint);
  };

  // A large figure takes seconds to be drawn on the server: its button says so meanwhile.
  const fetched = async (event, name) => {
    event.preventDefault();
    const button = event.currentTarget;
    const file = button.href.split("/").pop();
    text(button, `${name} ...`);
    try {
      const answer = await fetch(button.href);
      if (!answer.ok) throw new Error(answer.statusText);
      const url = URL.createObjectURL(await answer.blob());
      make("a", { href: url, download: file }).click();
      setTimeout(() => URL.revokeObjectURL(url), 60000);
      text(button, name);
    } catch {
      text(button, `${name}: gone, click a point first`);
    }
  };

  const sameInPython = (keep, view) => {
    const code = keep("code", () => make("code"));
    const link = (kind, name) =>
      keep(`link ${kind}`, () =>
        make("a", { class: "button", download: true, onclick: (event) => fetched(event, name) }, name));
    const [png, tensors] = [link("png", "PNG"), link("safetensors", "safetensors")];
    const copy = keep("copy", () => make("button", { type: "button", onclick: async () => {
      try {
        await navigator.clipboard.writeText(code.textContent);
        text(copy, "Copied");
      } catch {
        getSelection().selectAllChildren(code);
        text(copy, "Selected: press Ctrl+C");
      }
    } }, "Copy"));
    if (code.textContent !== view.recipe) {
      for (const [button, name] of [[copy, "Copy"], [png, "PNG"], [tensors, "safetensors"]]) text(button, name);
    }
    text(code, view.recipe);
    [png.href, tensors.href] = [view.files.png, view.files.safetensors];
    return keep("take", () => make("section", { class: "take" },
      make("div", { class: "row" }, make("h2", {}, "The same in Python"), copy, make("span", { class: "gap" }),
        make("span", { class: "aside" }, "Download"), png, tensors),
      make("pre", { tabindex: "0" }, code)));
  };

  const similarity = (panel) =>
    panel.score === null ? [] : [make("span", { class: "score" },
      `${panel.score.toFixed(2)} similar${panel.mutual ? ", mutual" : ""}`)];

  // A tooltip is not seen on a touch screen.
  const MEANING = "Similar: cosine similarity, 1 at most. Mutual: the place found leads back to the point, within a cell " +
    "of the map. Both compare features; neither is a probability that the match is right.";
  const legend = (keep, shown, words) => shown ? keep("legend", () => make("p", { class: "aside" }, words)) : null;

  const pointIn = (picture, act) => (x, y) => act({ kind: "point", picture: picture.key, x, y });
  const nothing = { marks: [], heat: null, score: null };

  const stageParts = {
    match: (keep, view, act) => {
      const grid = keep("grid", () => make("div", { class: "grid" }));
      grid.style.setProperty("--count", view.pictures.length);
      return [pointList(keep, view, act), fill(grid, view.pictures.map((picture) => {
        const panel = (view.panels || {})[picture.key] || nothing;
        return drawCard(keep, picture.key, picture, {
          src: picture.url, alt: picture.title, heat: panel.heat, marks: panel.marks, onpoint: pointIn(picture, act),
          caption: [make("span", { class: "name" }, picture.title), ...similarity(panel)],
        });
      })), legend(keep, Object.values(view.panels || {}).some((panel) => panel.score !== null), MEANING)];
    },

    maps: (keep, view) => {
      if (!view.columns) return [];
      const table = keep("table", () => make("div", { class: "table" }));
      const wide = keep("wide", () =>
        make("div", { class: "wide", tabindex: "0", role: "region", "aria-label": "Maps" }, table));
      const caption = keep("caption", () => make("p", { class: "aside" }));
      table.style.setProperty("--columns", view.columns.length + 1);
      text(caption, view.caption);
      fill(table,
        keep("head", () => make("div", { class: "head" }, "Picture")),
        view.columns.map(({ name, title }) =>
          keep(`head ${name} ${title}`, () => make("div", { class: "head" }, make("b", {}, name), title))),
        view.pictures.map((picture) => [
          drawCard(keep, picture.key, picture, { src: picture.url, alt: picture.title }),
          view.columns.map(({ name }, n) => drawCard(keep, `${picture.key} ${name}`, picture, {
            src: (view.cells[picture.key] || [])[n], alt: `${picture.title}, ${name}` })),
        ]));
      return [wide, caption];
    },

    compare: (keep, view, act) => {
      if (!view.sides) return [];
      const sides = view.sides.map((side) => {
        const name = side.title.toLowerCase();
        const model = keep(`model ${name}`, () => make("small"));
        const cost = keep(`cost ${name}`, () => make("p", { class: "cost" }));
        const pairs = keep(`pairs ${name}`, () => make("div", { class: "pairs" }));
        text(model, side.model);
        cost.replaceChildren(make("b", {}, seconds(side.seconds)),
          ` a picture: ${side.passes}`);
        fill(pairs, view.pictures.map((picture) => {
          const panel = side.panels[picture.key] || nothing;
          return fill(keep(`pair ${name} ${picture.key}`, () => make("div", { class: "pair" })),
            drawCard(keep, `${name} ${picture.key}`, picture, {
              src: picture.url, alt: picture.title, heat: panel.heat, marks: panel.marks, caption: similarity(panel),
              onpoint: pointIn(picture, act),
            }),
            drawCard(keep, `${name} pca ${picture.key}`, picture, {
              src: side.pca[picture.key], alt: `${picture.title}: main directions` }));
        }));
        return keep(`side ${name}`, () =>
          make("section", { class: "side", "data-side": name }, make("h2", {}, side.title, model), cost, pairs));
      });
      return [
        pointList(keep, view, act),
        fill(keep("sides", () => make("div", { class: "sides" })), sides),
        legend(keep, true,
          "Left of each pair: where the selected point is found. Right: the map's three main directions as colours, " +
          "turned so that both sides agree. Times are those of computing the features on this machine, once, encoder " +
          `included: with other work beside it they are longer. ${MEANING}`),
      ];
    },
  };

  const heatSlider = (element) =>
    make("label", { class: "opacity" }, "Heat",
      make("input", { type: "range", min: 0, max: 1, step: 0.05, value: 0.8,
        oninput: (event) => element.style.setProperty("--heat", event.target.value) }));

  // --- a tab -------------------------------------------------------------------------------------------------------

  const stage = (element, props, watch, tell) => {
    let asked = 0;
    const act = (action) => {
      if (action.kind !== "poll") asked = performance.now();
      tell(action);
    };
    const keep = keeper();
    let last = null; // the last view drawn that had a result
    let version = 0;
    let token = "";
    let timer = 0;
    const draw = () => {
      const view = props.value;
      const drawn = element.querySelector(".drawn");
      if (!view || !drawn) return;
      if (view.token !== token) version = 0; // the server began a new session
      token = view.token;
      if (view.version < version) return; // overtaken by a later answer
      version = view.version;
      const has = Boolean(view.recipe);
      // While features are being computed the last result of this tab stays, with the points as they are now.
      const { points, pictures, selected } = view;
      const whole = has || !last ? view : { ...last, points, pictures, selected };
      if (has) last = view;
      else if (!view.busy) last = null;
      const shown = has || view.busy ? whole : view;
      const empty = view.pictures.length === 0;
      const timing = keep("timing", () => make("span", { class: "aside timing" }));
      timing.dataset.ms = has ? view.milliseconds : "";
      text(timing, has ? `answered in ${seconds(view.milliseconds / 1000)}` : "");
      const row = keep("row", () => make("div", { class: "row" }));
      const gap = keep("gap", () => make("span", { class: "gap" }));
      const heat = view.kind === "maps" || empty ? null : keep("heat", () => heatSlider(element));
      fill(drawn,
        notice(keep, view),
        view.busy && busy(keep, view, act),
        empty ? keep("empty", () => make("p", { class: "hint" }, "Add a picture above: a sample, or one of yours."))
          : stageParts[view.kind](keep, shown, act),
        fill(row, heat, gap, timing),
        has && sameInPython(keep, view));
      keep.sweep();
      drawn.dataset.version = view.version;
      drawn.dataset.state = view.busy ? "busy" : has ? "done" : "empty";
      if (has) drawn.dataset.milliseconds = Math.round(performance.now() - asked); // from the click to here
      clearTimeout(timer);
      if (view.busy) timer = setTimeout(ask, 200);
    };
    const ask = () => {
      act({ kind: "poll" });
      timer = setTimeout(ask, 5000); // an answer that the network lost ends nothing
    };
    watch("value", draw);
    draw();
  };

  return { stage, make, fill, text, keeper };
})();
