// The pictures that are here, and the ways for others to come: files, clipboard, dropping, camera, samples.
lookAtFeatures.tray = (() => {
  "use strict";
  const { make, fill, text, keeper } = lookAtFeatures;

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

  return (element, props, watch, act) => {
    let open = false; // whether the samples are shown
    let view = null; // the last one that was drawn
    const keep = keeper();
    const status = make("span", { class: "status", role: "status" });

    const say = (words, wrong = false) => {
      text(status, words);
      status.classList.toggle("wrong", wrong);
    };

    const send = async (files) => {
      const wrong = [];
      for (const file of files) {
        say(`Reading ${file.name} ...`);
        try {
          const name = encodeURIComponent(file.name || "pasted.png");
          const answer = await (await fetch(`uploads/${view.token}?name=${name}`, { method: "POST", body: file })).json();
          if (answer.error) wrong.push(`${file.name}: ${answer.error}`);
        } catch {
          wrong.push(`${file.name} did not arrive; is the server still running?`);
        }
      }
      say(wrong.join("\n"), true);
      act({ kind: "uploaded" });
    };

    const chooser = make("input", { type: "file", accept: "image/*", multiple: true, hidden: true, class: "chooser",
      onchange: (event) => { send([...event.target.files]); event.target.value = ""; } });

    const upload = make("button", { type: "button", class: "main", onclick: () => chooser.click() }, "Upload");
    let asking = false; // whether the browser asks if it may use the camera
    const photograph = async () => {
      if (asking) return;
      asking = true;
      say(await cameraDialog(send), true);
      asking = false;
    };
    const camera = make("button", { type: "button", onclick: photograph }, "Camera");
    const more = make("button", { type: "button", onclick: () => { open = !open; draw(); } });
    const strip = make("div", { class: "strip" });
    const samples = make("div", { class: "samples" });
    const hint = make("span", { class: "aside wideonly" }, "or paste, or drop a picture anywhere");
    const row = make("div", { class: "row" }, upload, camera, more, hint, status, chooser);

    const thumb = (picture) => {
      const figure = keep(picture.url, () => make("figure", { class: "thumb" },
        make("img", { src: picture.url, alt: picture.title }),
        make("button", { type: "button", class: "remove", "aria-label": `Remove ${picture.title}`,
          onclick: () => act({ kind: "remove", picture: picture.key }) }, "×"),
        make("a", { class: "save", href: picture.file, download: true, title: "Save this picture",
          "aria-label": `Save ${picture.title}` }, "↓")));
      figure.title = picture.note || picture.name;
      return figure;
    };

    const draw = () => {
      const now = props.value;
      const drawn = element.querySelector(".drawn");
      if (!now || !drawn) return;
      if (!view || now.token !== view.token || now.version >= view.version) view = now; // else it was overtaken
      const full = view.pictures.length >= view.most;
      upload.disabled = camera.disabled = full;
      more.setAttribute("aria-expanded", String(open));
      text(more, open ? "Hide samples" : "Samples");
      samples.hidden = !open;
      fill(strip, view.pictures.map(thumb));
      fill(samples, (open ? view.samples : []).map((sample) => {
        const button = keep(sample.url, () => make("button", { type: "button", class: "thumb", title: sample.title,
          onclick: () => act({ kind: "sample", name: sample.name }) },
          make("img", { src: sample.url, alt: sample.title })));
        button.disabled = sample.used || full;
        return button;
      }));
      fill(drawn, strip, row, samples);
      keep.sweep();
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
})();
