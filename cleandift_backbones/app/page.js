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
  let token = ""; // this page's secret, in addresses of pictures and results

  // --- one picture with heat, marks and a caption ------------------------------------------------------------------

  const dot = (mark) =>
    make("span", {
      class: `mark ${mark.source ? "source" : "found"}${mark.selected ? " selected" : ""}`,
      style: { left: percent(mark.x), top: percent(mark.y), "--colour": mark.colour },
      "data-number": mark.number, "data-x": mark.x, "data-y": mark.y,
    }, String(mark.number));

  // Cards are kept by name and changed in place, so that pictures do not flicker.
  const cards = () => {
    const kept = new Map();
    const card = (name, picture, onpoint) => {
      if (!kept.has(name)) {
        const image = make("img", { class: "ground", draggable: "false" });
        const heat = make("img", { class: "heat", alt: "", draggable: "false" });
        const marks = make("div", { class: "marks" });
        const view = make("div", { class: "view" }, image, heat, marks);
        const caption = make("figcaption");
        const figure = make("figure", { class: "card" }, view, caption);
        const state = { figure, view, image, heat, marks, caption, onpoint: null };
        const at = (event) => {
          const box = view.getBoundingClientRect();
          return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
        };
        const point = (x, y) => {
          if (!state.onpoint || x < 0 || x > 1 || y < 0 || y > 1) return;
          marks.append(make("span", { class: "mark pending", style: { left: percent(x), top: percent(y) } }));
          state.onpoint(x, y);
        };
        view.addEventListener("click", (event) => point(...at(event)));
        let cross = null; // the keyboard's way: arrows move a cross, Enter sets the point
        view.addEventListener("keydown", (event) => {
          const step = event.shiftKey ? 0.01 : 0.04;
          const moves = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
          if (!state.onpoint || !(event.key in moves || event.key === "Enter")) return;
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
        kept.set(name, state);
      }
      const state = kept.get(name);
      state.onpoint = onpoint || null;
      state.view.style.aspectRatio = `${picture.width} / ${picture.height}`;
      state.view.classList.toggle("clickable", Boolean(onpoint));
      if (onpoint) {
        state.view.tabIndex = 0;
        state.view.setAttribute("aria-label", `${picture.title}: click a point, or move with the arrow keys and press Enter`);
      }
      return state;
    };
    const show = (state, { src, alt, heat = null, marks = [], caption = [] }) => {
      if (state.image.getAttribute("src") !== src) state.image.src = src;
      state.image.alt = alt;
      if (heat && state.heat.getAttribute("src") !== heat) state.heat.src = heat;
      state.view.classList.toggle("heated", Boolean(heat));
      state.marks.replaceChildren(...marks.map(dot));
      state.caption.replaceChildren(...caption);
      return state.figure;
    };
    const forget = (names) => { for (const name of kept.keys()) if (!names.has(name)) kept.delete(name); };
    return { card, show, forget };
  };

  // --- parts of a stage --------------------------------------------------------------------------------------------

  const notice = (view) =>
    make("div", { class: `notice${view.error ? " error" : ""}`, role: "status", hidden: !view.notice }, view.notice || "");

  const busy = (view, act) =>
    make("div", { class: "busy", role: "progressbar", "aria-valuenow": Math.round(100 * view.busy.share) },
      make("div", { class: "bar" }, make("div", { style: { width: percent(Math.max(0.02, view.busy.share)) } })),
      make("span", {}, view.busy.text),
      make("button", { type: "button", class: "stop", onclick: () => act({ kind: "stop" }) }, "Stop"));

  const pointList = (view, act) => {
    if (!view.points.length) return make("div", { class: "points hint" }, "Click a point in any picture.");
    return make("div", { class: "points" },
      view.points.map((point, n) =>
        make("span", { class: `chip${n === view.selected ? " selected" : ""}`, style: { "--colour": point.colour } },
          make("button", { type: "button", title: "Show where this point is found",
            onclick: () => act({ kind: "select", number: point.number }) },
            make("b", {}, String(point.number)), point.name),
          make("button", { type: "button", class: "remove", "aria-label": `Remove point ${point.number}`,
            onclick: () => act({ kind: "unpoint", number: point.number }) }, "×"))),
      make("button", { type: "button", class: "plain", onclick: () => act({ kind: "clear" }) }, "Clear all"));
  };

  const sameInPython = (view) => {
    if (!view.recipe) return null;
    const copy = make("button", { type: "button", onclick: async () => {
      try {
        await navigator.clipboard.writeText(view.recipe);
        copy.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(code);
        copy.textContent = "Selected: press Ctrl+C";
      }
    } }, "Copy");
    const code = make("code", {}, view.recipe);
    return make("section", { class: "take" },
      make("div", { class: "row" },
        make("h3", {}, "The same in Python"), copy, make("span", { class: "gap" }),
        make("span", { class: "aside" }, "Download"),
        make("a", { class: "button", href: view.files.png, download: true }, "PNG"),
        make("a", { class: "button", href: view.files.safetensors, download: true }, "safetensors")),
      make("pre", {}, code));
  };

  const similarity = (panel) =>
    panel.score === null ? [] : [make("span", { class: "score" },
      `${panel.score.toFixed(2)} similar${panel.mutual ? ", mutual" : ""}`)];

  const pointIn = (picture, act) => (x, y) => act({ kind: "point", picture: picture.key, x, y });

  const stageParts = {
    match: (view, { card, show }, act) => [
      pointList(view, act),
      make("div", { class: "grid", style: { "--count": view.pictures.length } }, view.pictures.map((picture) => {
        const panel = (view.panels || {})[picture.key] || { marks: [], heat: null, score: null };
        return show(card(picture.key, picture, pointIn(picture, act)), {
          src: picture.url, alt: picture.title, heat: panel.heat, marks: panel.marks,
          caption: [make("span", { class: "name" }, picture.title), ...similarity(panel)],
        });
      })),
    ],

    maps: (view, { card, show }) => view.columns ? [
      make("div", { class: "wide", tabindex: "0" },
        make("div", { class: "table", style: { "--columns": view.columns.length + 1 } },
          make("div", { class: "head" }, "Picture"),
          view.columns.map((column) => make("div", { class: "head" }, make("b", {}, column.name), column.title)),
          view.pictures.map((picture) => [
            show(card(picture.key, picture), { src: picture.url, alt: picture.title }),
            ...(view.cells[picture.key] || []).map((uri, n) =>
              show(card(`${picture.key} ${n}`, picture), { src: uri, alt: `${picture.title}, ${view.columns[n].name}` })),
          ]))),
      make("p", { class: "aside" }, view.caption),
    ] : [],

    compare: (view, { card, show }, act) => view.sides ? [
      pointList(view, act),
      make("div", { class: "sides" }, view.sides.map((side) =>
        make("section", { class: "side", "data-side": side.title.toLowerCase() },
          make("h3", {}, side.title, make("small", {}, side.model)),
          make("p", { class: "cost" }, make("b", {}, seconds(side.seconds)),
            ` for ${side.count} picture${side.count === 1 ? "" : "s"}: ${side.passes}`),
          make("div", { class: "pairs" }, view.pictures.map((picture) => {
            const panel = side.panels[picture.key] || { marks: [], heat: null, score: null };
            return make("div", { class: "pair" },
              show(card(`${side.title} ${picture.key}`, picture, pointIn(picture, act)), {
                src: picture.url, alt: picture.title, heat: panel.heat, marks: panel.marks, caption: similarity(panel),
              }),
              show(card(`${side.title} pca ${picture.key}`, picture), {
                src: side.pca[picture.key], alt: `${picture.title}: main directions`,
              }));
          }))))),
      make("p", { class: "aside" }, "Left of each pair: where the selected point is found. Right: the map's three main " +
        "directions as colours, turned so that both sides agree. Times are of this machine, encoder included."),
    ] : [],
  };

  const heatSlider = (element) =>
    make("label", { class: "opacity" }, "Heat",
      make("input", { type: "range", min: 0, max: 1, step: 0.05, value: element.dataset.heat || 0.8,
        oninput: (event) => {
          element.dataset.heat = event.target.value;
          element.style.setProperty("--heat", event.target.value);
        } }));

  // --- a tab -------------------------------------------------------------------------------------------------------

  const stage = (element, props, watch, tell) => {
    let asked = 0;
    const act = (action) => {
      if (action.kind !== "poll") asked = performance.now();
      tell(action);
    };
    const kit = cards();
    let last = null; // the last view drawn that had a result
    let version = 0;
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
      const whole = has || !last ? view : { ...last, points: view.points, pictures: view.pictures, selected: view.selected };
      if (has) last = view;
      else if (!view.busy) last = null;
      const shown = has || view.busy ? whole : view;
      const empty = view.pictures.length === 0;
      drawn.replaceChildren(...[
        notice(view),
        view.busy ? busy(view, act) : null,
        empty ? make("p", { class: "hint" }, "Add a picture above: a sample, or one of yours.") : null,
        ...(empty ? [] : stageParts[view.kind](shown, kit, act)),
        make("div", { class: "row" }, view.kind === "maps" ? null : heatSlider(element), make("span", { class: "gap" }),
          has ? make("span", { class: "aside timing", "data-ms": view.milliseconds }, `answered in ${seconds(view.milliseconds / 1000)}`) : null),
        sameInPython(has ? view : {}),
      ].filter(Boolean));
      drawn.dataset.version = view.version;
      drawn.dataset.state = view.busy ? "busy" : has ? "done" : "empty";
      if (has) drawn.dataset.milliseconds = Math.round(performance.now() - asked); // from the click to here
      clearTimeout(timer);
      if (view.busy) timer = setTimeout(() => act({ kind: "poll" }), 200);
    };
    watch("value", draw);
    draw();
  };

  // --- pictures ----------------------------------------------------------------------------------------------------

  const cameraDialog = async (send) => {
    let stream;
    try {
      stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
    } catch (error) {
      return `The camera cannot be used (${error.name || "no secure page"}): allow it, or upload a picture.`;
    }
    const video = make("video", { autoplay: true, playsinline: true, muted: true });
    video.srcObject = stream;
    const dialog = make("dialog", { class: "camera" }, video,
      make("div", { class: "row" },
        make("button", { type: "button", class: "main", onclick: () => {
          const canvas = make("canvas", { width: video.videoWidth, height: video.videoHeight });
          canvas.getContext("2d").drawImage(video, 0, 0);
          canvas.toBlob((blob) => send([new File([blob], "camera.png", { type: "image/png" })]));
          dialog.close();
        } }, "Take the picture"),
        make("button", { type: "button", onclick: () => dialog.close() }, "Close")));
    dialog.addEventListener("close", () => { stream.getTracks().forEach((track) => track.stop()); dialog.remove(); });
    document.body.append(dialog);
    dialog.showModal();
    return "";
  };

  const tray = (element, props, watch, act) => {
    let open = false; // whether the samples are shown
    const status = make("span", { class: "status", role: "status" });

    const send = async (files) => {
      for (const file of files) {
        status.textContent = `Reading ${file.name} ...`;
        try {
          const name = encodeURIComponent(file.name || "pasted.png");
          const answer = await (await fetch(`uploads/${token}?name=${name}`, { method: "POST", body: file })).json();
          status.textContent = answer.error ? `${file.name}: ${answer.error}` : "";
        } catch {
          status.textContent = `${file.name} did not arrive; is the server still running?`;
        }
      }
      act({ kind: "uploaded" });
    };

    const chooser = make("input", { type: "file", accept: "image/*", multiple: true, hidden: true, class: "chooser",
      onchange: (event) => { send([...event.target.files]); event.target.value = ""; } });

    const draw = () => {
      const view = props.value;
      const drawn = element.querySelector(".drawn");
      if (!view || !drawn) return;
      token = view.token;
      const full = view.pictures.length >= view.most;
      drawn.replaceChildren(
        make("div", { class: "strip" }, view.pictures.map((picture) =>
          make("figure", { class: "thumb", title: picture.note || picture.name },
            make("img", { src: picture.url, alt: picture.title }),
            make("button", { type: "button", class: "remove", "aria-label": `Remove ${picture.title}`,
              onclick: () => act({ kind: "remove", picture: picture.key }) }, "×"),
            make("a", { class: "save", href: picture.file, download: true, title: "Save this picture" }, "↓")))),
        make("div", { class: "row" },
          make("button", { type: "button", class: "main", disabled: full, onclick: () => chooser.click() }, "Upload"),
          make("button", { type: "button", disabled: full, onclick: async () => {
            status.textContent = await cameraDialog(send);
          } }, "Camera"),
          make("button", { type: "button", "aria-expanded": String(open), onclick: () => { open = !open; draw(); } },
            open ? "Hide samples" : "Samples"),
          make("span", { class: "aside wideonly" }, "or paste, or drop a picture anywhere"), status, chooser),
        make("div", { class: "samples", hidden: !open }, open ? view.samples.map((sample) =>
          make("button", { type: "button", class: "thumb", disabled: sample.used || full, title: sample.title,
            onclick: () => act({ kind: "sample", name: sample.name }) },
            make("img", { src: sample.url, alt: sample.title }))) : []));
    };

    const images = (transfer) => [...((transfer && transfer.files) || [])];
    document.addEventListener("paste", (event) => {
      const files = images(event.clipboardData);
      if (files.length) { event.preventDefault(); send(files); }
    });
    document.addEventListener("dragover", (event) => event.preventDefault());
    document.addEventListener("drop", (event) => {
      const files = images(event.dataTransfer);
      if (files.length) { event.preventDefault(); send(files); }
    });
    watch("value", draw);
    draw();
  };

  return { stage, tray };
})();
