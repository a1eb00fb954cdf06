// Scans to look at: a panel around NiiVue's canvas, for the page of `serve` and for pages that contain their scans.
//
//   const panel = await openPanel(element, { title: "T1 of sub-01", volume: { url: "/api/scans/ID/file" } });
//   await panel.setOverlay({ url: "/api/maps/ID", unit: "nats per voxel" });   // null removes it
//   await panel.setVolume({ url: "…" });
//   panel.close();
//
// A volume or an overlay is a NIfTI, gzipped or not, from { url } (fetched from the page's own server), { base64 } or
// { bytes } (an ArrayBuffer). The crosshair starts `at` three fractions of the way from the patient's left to right, back
// to front and bottom to top, or at the centre. `origin` says from where mm are counted. An overlay may also give
// `unit`, `limit` (the value with full colour) and `threshold`.
// Use by mouse, touch, keyboard and screen reader; no inline style or script; nothing is logged.
"use strict";

// NiiVue draws maps opaque, so brightness shows how far a value is from 0.
const POSITIVE = { R: [110, 110, 225, 255], G: [8, 8, 40, 170], B: [8, 8, 25, 120], A: [0, 255, 255, 255], I: [0, 1, 140, 255] };
const NEGATIVE = { R: [15, 15, 40, 160], G: [35, 35, 100, 205], B: [120, 120, 255, 255], A: [0, 255, 255, 255], I: [0, 1, 140, 255] };
const COLOURS_FROM_ZERO = 2; // NiiVue's colour map type: from 0, and transparent below the threshold
const OPACITY = 0.75;
const PLANES = [
  { name: "sagittal", from: "R", to: "L" },
  { name: "coronal", from: "P", to: "A" },
  { name: "axial", from: "I", to: "S" },
];
const VIEWS = { "three planes": "sliceTypeMultiplanar", axial: "sliceTypeAxial", coronal: "sliceTypeCoronal", sagittal: "sliceTypeSagittal" };
const LAYOUTS = { grid: 2, row: 3 }; // NiiVue's numbers
const PADDING = 4; // pixels between planes
const LINE = 2; // pixels across the lines of the crosshair: thinner ones may miss every pixel
const KEYS = "Arrow keys: sagittal and axial slice. Page up and down: coronal slice. [ and ]: frame. R: reset.";
let panels = 0;

function make(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

// Whether this browser has the WebGL 2 that NiiVue draws with.
function canDrawScans() {
  const gl = document.createElement("canvas").getContext("webgl2");
  gl?.getExtension("WEBGL_lose_context")?.loseContext();
  return Boolean(gl);
}

function shortNumber(value) {
  if (!Number.isFinite(value)) return "–";
  if (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e6)) return value.toExponential(2);
  return String(Number(value.toPrecision(4)));
}

async function readBytes(source) {
  if (source.bytes) return source.bytes;
  if (source.base64) return Uint8Array.from(atob(source.base64), (letter) => letter.charCodeAt(0)).buffer;
  const answer = await fetch(source.url, { credentials: "same-origin" });
  if (!answer.ok) throw new Error(`the scan could not be loaded: ${answer.status} ${answer.statusText}`);
  return answer.arrayBuffer();
}

async function readVolume(source) {
  const bytes = await readBytes(source);
  try {
    return await niivue.NVImage.new(bytes, source.name ?? "scan.nii", "gray", 1, null, NaN, NaN, true, 0.005);
  } catch (error) {
    throw new Error("this is no NIfTI file, or a damaged one", { cause: error });
  }
}

// The value that gets full colour if the overlay names none: the 99th percentile of the sizes that are not 0.
function usualLimit(values) {
  const step = Math.max(1, Math.floor(values.length / 200000));
  const sizes = [];
  for (let i = 0; i < values.length; i += step) if (values[i]) sizes.push(Math.abs(values[i]));
  sizes.sort((a, b) => a - b);
  return sizes[Math.floor(0.99 * sizes.length)] || 1;
}

// A slider with its name and value; `say(value)` is the text of a value.
function makeSlider(name, { min, max, step, value, say, change }) {
  const text = make("output", { "aria-live": "off" }); // the input says its value, and many change at once
  const input = make("input", { type: "range", min: String(min), max: String(max), step: String(step) });
  const show = () => {
    text.textContent = say(Number(input.value));
    input.setAttribute("aria-valuetext", text.textContent);
  };
  input.setAttribute("aria-label", name);
  input.value = String(value);
  input.addEventListener("input", () => {
    change(Number(input.value));
    show();
  });
  show();
  const element = make("div", { className: "slider" }, make("span", {}, name), text, input);
  return { element, get value() { return Number(input.value); }, set(next) { input.value = String(next); show(); } };
}

class Panel {
  #host;
  #title;
  #canvas;
  #stage;
  #controls;
  #bar;
  #readout;
  #status;
  #sliders = {};
  #view = "three planes";
  #overlay = null;
  #loads = { volume: 0, overlay: 0 }; // of each the number of the newest, since an older one may arrive after it
  #resizing;

  constructor(host, title, at, origin) {
    this.at = at;
    this.origin = origin;
    const help = `panel-${++panels}-keys`;
    this.#host = host;
    this.#title = title;
    this.#canvas = make("canvas", { tabIndex: 0, role: "application", "aria-label": `scan: ${title}`, "aria-describedby": help });
    this.#stage = make("div", { className: "panel-stage" }, this.#canvas);
    this.#bar = make("div", { className: "panel-bar", hidden: true });
    this.#controls = make("div", { className: "panel-controls" });
    this.#readout = make("p", { className: "panel-readout" });
    this.#status = make("p", { className: "panel-status", role: "status" }, "Loading the scan…");
    const keys = make("p", { className: "panel-keys", id: help }, KEYS);
    const group = make("div", { className: "panel", role: "group", "aria-label": title },
      this.#stage, this.#bar, this.#readout, this.#controls, keys, this.#status);
    host.replaceChildren(group);
    this.nv = new niivue.Niivue({
      logLevel: "error", dragAndDropEnabled: false, isRadiologicalConvention: true, sagittalNoseLeft: true,
      multiplanarShowRender: 0, multiplanarPadPixels: PADDING, crosshairColor: [0.4, 0.78, 1, 0.85],
      crosshairWidthUnit: "mm", crosshairGap: 8, showAllOrientationMarkers: true, fontColor: [1, 1, 1, 1], scrollRequiresFocus: true,
      viewModeHotKey: "", clipPlaneHotKey: "", cycleClipPlaneHotKey: "", isColorbar: false,
    });
    const draw = this.nv.drawScene.bind(this.nv);
    this.nv.drawScene = () => (this.#isVisible() ? draw() : ""); // in a hidden canvas, planes would have a width below 0
    this.#stage.addEventListener("keydown", (event) => this.#press(event), true);
    this.#stage.addEventListener("wheel", (event) => {
      if (document.activeElement !== this.#canvas) event.stopPropagation(); // the page scrolls, not the slices
    }, { capture: true, passive: true });
    this.#canvas.addEventListener("webglcontextlost", () => { this.#status.textContent = "The browser stopped drawing this scan."; });
  }

  async start(volume, overlay) {
    await this.nv.attachToCanvas(this.#canvas);
    this.nv.addColormap("umbrella-positive", POSITIVE);
    this.nv.addColormap("umbrella-negative", NEGATIVE);
    this.nv.onLocationChange = () => this.#tell();
    this.nv.onIntensityChange = () => this.#tell();
    this.#resizing = new ResizeObserver(() => requestAnimationFrame(() => this.#fit()));
    this.#resizing.observe(this.#canvas); // after NiiVue's own observer, so the planes have their new size
    await this.setVolume(volume);
    if (overlay) await this.setOverlay(overlay);
  }

  // Show another volume at the same place in mm, if there is one; the overlay is removed.
  async setVolume(source) {
    const number = ++this.#loads.volume;
    this.#loads.overlay += 1; // a map of the volume before
    const volume = await this.#load(source);
    if (number !== this.#loads.volume) return;
    const mm = this.nv.volumes.length && this.isOriented ? this.#mm() : null;
    [...this.nv.volumes].reverse().forEach((old) => this.nv.removeVolume(old));
    this.#overlay = null;
    const { qform_code: qform, sform_code: sform } = volume.hdr;
    this.isOriented = qform > 0 || sform > 0;
    this.nv.opts.isOrientationTextVisible = this.isOriented;
    this.nv.addVolume(volume);
    this.window = [volume.cal_min, volume.cal_max];
    this.#view = "three planes";
    this.#build();
    this.reset();
    if (mm && this.isOriented) this.#goTo(mm);
  }

  // Lay a map over the volume, with a colour bar and a threshold; null removes it.
  async setOverlay(source) {
    const number = ++this.#loads.overlay;
    const map = source && (await this.#load(source));
    if (number !== this.#loads.overlay) return;
    if (this.#overlay) this.nv.removeVolume(this.#overlay.map);
    this.#overlay = null;
    if (map) {
      const limit = source.limit ?? usualLimit(map.img);
      map.colormap = "umbrella-positive";
      map.colormapNegative = "umbrella-negative";
      map.colormapType = COLOURS_FROM_ZERO;
      const threshold = source.threshold ?? limit / 5;
      this.#overlay = { map, limit, threshold, shown: threshold, unit: source.unit ?? "", isSigned: map.img.some((value) => value < 0) };
      map.opacity = OPACITY;
      this.nv.addVolume(map);
    }
    this.#build();
    if (map) this.#resetOverlay();
    else this.nv.updateGLVolume();
    this.setFrame(this.nv.volumes[0].frame4D);
  }

  // Show a frame of a 4D volume and of the map over it, counted from 0.
  setFrame(frame) {
    for (const { id, nFrame4D: count = 1 } of this.nv.volumes) this.nv.setFrame4D(id, Math.min(Math.max(frame, 0), count - 1));
    this.#tell();
  }

  // Return to the centre, the usual window, the first frame, the usual threshold and three planes.
  reset() {
    const { nv } = this;
    const volume = nv.volumes[0];
    [volume.cal_min, volume.cal_max] = this.window;
    this.setFrame(0);
    nv.scene.pan2Dxyzmm = [0, 0, 0, 1];
    nv.scene.crosshairPos = [...this.at];
    this.#view = "three planes";
    if (this.#overlay) this.#resetOverlay();
    this.#host.querySelector("select").value = this.#view;
    this.#showView();
    nv.updateGLVolume();
    this.#sliders.black?.set(this.window[0]);
    this.#sliders.white?.set(this.window[1]);
    this.#tell();
  }

  // Remove the panel and give its memory on the graphics card back.
  close() {
    this.#loads = { volume: Infinity, overlay: Infinity }; // what is still loading is not shown
    this.#resizing?.disconnect();
    this.nv.cleanup();
    this.#canvas.getContext("webgl2")?.getExtension("WEBGL_lose_context")?.loseContext();
    this.#host.replaceChildren();
  }

  async #load(source) {
    this.#status.textContent = "Loading the scan…";
    try {
      const volume = await readVolume(source);
      this.#status.textContent = "";
      return volume;
    } catch (error) {
      this.#status.textContent = `Not shown: ${error.message}`;
      throw error;
    }
  }

  #resetOverlay() {
    const { limit, threshold } = this.#overlay;
    this.#setRange(threshold, limit);
    this.#sliders.threshold?.set((100 * threshold) / limit);
    this.#sliders.opacity?.set(OPACITY);
    this.nv.setOpacity(1, OPACITY);
  }

  #setRange(threshold, limit) {
    const { map } = this.#overlay;
    Object.assign(map, { cal_min: Math.min(threshold, 0.999 * limit), cal_max: limit });
    this.nv.updateGLVolume();
    this.#overlay.shown = Math.min(threshold, limit);
    this.#bar.querySelectorAll(".panel-hidden").forEach((part) => { part.style.width = `${(100 * this.#overlay.shown) / limit}%`; });
    this.#bar.querySelector(".panel-scale").textContent = this.#scaleText();
  }

  // The unit of the map, and which values have no colour.
  #scaleText() {
    const { unit, shown, isSigned } = this.#overlay;
    const hidden = isSigned ? `no colour within ±${shortNumber(shown)}` : `no colour below ${shortNumber(shown)}`;
    return [unit, shown > 0 ? hidden : ""].filter(Boolean).join(" · ");
  }

  // The texts below the bar's ends and its middle.
  #endTexts() {
    const { limit, isSigned } = this.#overlay;
    return [...(isSigned ? [`−${shortNumber(limit)} or less`] : []), "0", `${isSigned ? "+" : ""}${shortNumber(limit)} or more`];
  }

  // Make the controls that this volume and this overlay need.
  #build() {
    const { nv } = this;
    const volume = nv.volumes[0];
    const { global_min: low, global_max: high } = volume;
    const sliders = {};
    PLANES.forEach(({ name, from, to }, axis) => {
      const length = volume.dimsRAS[axis + 1];
      const title = this.isOriented ? `${name}, ${from} to ${to}` : `slice along ${"ijk"[axis]}`;
      sliders[name] = makeSlider(title, {
        min: 0, max: length - 1, step: 1, value: 0,
        say: (value) => `${value + 1} of ${length}`,
        change: (value) => this.#moveTo(axis, value),
      });
    });
    if (volume.nFrame4D > 1) {
      const repetition = volume.hdr.pixDims[4];
      sliders.frame = makeSlider("frame", {
        min: 0, max: volume.nFrame4D - 1, step: 1, value: 0,
        say: (value) => `${value + 1} of ${volume.nFrame4D}${repetition > 0 ? `, ${shortNumber(value * repetition)} s` : ""}`,
        change: (value) => this.setFrame(value),
      });
    }
    const step = (high - low) / 500 || 1;
    const changeWindow = () => {
      volume.cal_min = Math.min(sliders.black.value, sliders.white.value - step);
      volume.cal_max = sliders.white.value;
      nv.updateGLVolume();
    };
    for (const [key, at] of [["black", 0], ["white", 1]]) {
      sliders[key] = makeSlider(`${key} at`, { min: low, max: high, step, value: this.window[at], say: shortNumber, change: changeWindow });
    }
    if (this.#overlay) {
      const { limit, threshold } = this.#overlay;
      sliders.threshold = makeSlider("map from", {
        min: 0, max: 100, step: 1, value: (100 * threshold) / limit, say: (percent) => shortNumber((percent * limit) / 100),
        change: (percent) => this.#setRange((percent * limit) / 100, limit),
      });
      sliders.opacity = makeSlider("map opacity", {
        min: 0, max: 1, step: 0.05, value: OPACITY, say: (value) => `${Math.round(100 * value)} %`,
        change: (value) => nv.setOpacity(1, value),
      });
    }
    const view = make("select", {}, ...Object.keys(VIEWS).map((name) => make("option", { value: name }, name)));
    view.value = this.#view;
    view.addEventListener("change", () => {
      this.#view = view.value;
      this.#showView();
    });
    const reset = make("button", { type: "button" }, "Reset");
    reset.addEventListener("click", () => this.reset());
    const whole = make("button", { type: "button" }, "Full screen");
    whole.addEventListener("click", () => {
      if (document.fullscreenElement) document.exitFullscreen();
      else this.#host.firstElementChild.requestFullscreen();
    });
    const picture = make("button", { type: "button" }, "Save picture");
    picture.addEventListener("click", () => this.#savePicture());
    const buttons = make("div", { className: "panel-buttons" }, make("label", {}, "view ", view), reset, whole, picture);
    this.#sliders = sliders;
    this.#controls.replaceChildren(...Object.values(sliders).map(({ element }) => element), buttons);
    this.#buildBar();
  }

  #isVisible() {
    return Math.min(this.#canvas.clientWidth, this.#canvas.clientHeight) > 2 * PADDING;
  }

  #showView() {
    this.nv.setSliceType(this.nv[VIEWS[this.#view]]);
    this.#fit();
  }

  // Give the stage the height of its planes, and the crosshair its width in pixels. A grid is taller than a row, so it is
  // only for narrow windows, where its planes are much larger.
  #fit() {
    const { nv } = this;
    if (!nv.volumes.length || !this.#isVisible()) return;
    const { dimsRAS, pixDimsRAS } = nv.volumes[0];
    const [x, y, z] = [1, 2, 3].map((axis) => dimsRAS[axis] * pixDimsRAS[axis]);
    const shapes = {
      "three planes": { row: [x + x + y, Math.max(y, z), 2, 0], grid: [x + y, y + z, 1, 1] },
      axial: { row: [x, y, 0, 0] }, coronal: { row: [x, z, 0, 0] }, sagittal: { row: [y, z, 0, 0] },
    };
    const [width, most] = [this.#stage.clientWidth, parseFloat(getComputedStyle(this.#stage).maxHeight)];
    const fits = Object.entries(shapes[this.#view]).map(([layout, [across, up, beside, above]]) => {
      const scale = Math.min((width - beside * PADDING) / across, (most - above * PADDING) / up);
      return { layout, scale, height: Math.ceil(scale * up + above * PADDING) };
    });
    const best = fits.reduce((row, grid) => (grid.scale > 1.25 * row.scale ? grid : row));
    nv.opts.multiplanarLayout = LAYOUTS[best.layout];
    this.#stage.style.height = `${best.height}px`; // NiiVue draws again once the canvas has it
    nv.setCrosshairWidth(LINE / best.scale);
  }

  #savePicture() {
    this.#picture().toBlob((content) => {
      const link = make("a", { href: URL.createObjectURL(content), download: `${this.#title.replace(/[^\p{L}\p{N}._-]+/gu, "-")}.png` });
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 60000);
    });
  }

  // Draw what the panel shows and, below it, what a reader of the picture needs: place, values, and colours with theirs.
  #picture() {
    this.nv.drawScene(); // a browser may have cleared what was drawn before
    const { width, height } = this.#canvas;
    const unit = width / this.#canvas.clientWidth; // device pixels of a CSS pixel
    const [margin, line, bar] = [12 * unit, 20 * unit, 12 * unit];
    const made = make("canvas", { width });
    const font = `${13 * unit}px system-ui, sans-serif`;
    const paper = made.getContext("2d");
    paper.font = font;
    const lines = [...(this.#overlay ? [this.#scaleText()] : []), this.#readout.textContent].flatMap((text) => {
      const rows = [""];
      for (const part of text.split(" · ")) {
        const longer = [rows.at(-1), part].filter(Boolean).join(" · ");
        if (rows.at(-1) && paper.measureText(longer).width > width - 2 * margin) rows.push(part);
        else rows[rows.length - 1] = longer;
      }
      return rows;
    });
    made.height = height + 2 * margin + line * lines.length + (this.#overlay ? bar + line : 0);
    Object.assign(paper, { font, fillStyle: "#000", textBaseline: "top" });
    paper.fillRect(0, 0, width, made.height);
    paper.drawImage(this.#canvas, 0, 0);
    let top = height + margin;
    if (this.#overlay) {
      this.#drawBar(paper, margin, top, Math.min(width - 2 * margin, 480 * unit), bar, line);
      top += bar + line;
    }
    paper.fillStyle = "#fff";
    for (const [i, text] of lines.entries()) paper.fillText(text, margin, top + line * (i + 0.2));
    return made;
  }

  // Draw the colour bar with the texts below it.
  #drawBar(paper, left, top, width, height, line) {
    const { limit, shown, isSigned } = this.#overlay;
    const halves = [...(isSigned ? [[NEGATIVE, -1]] : []), [POSITIVE, 1]];
    const zero = isSigned ? left + width / 2 : left;
    const length = width / halves.length;
    for (const [colours, sign] of halves) {
      const gradient = paper.createLinearGradient(zero, 0, zero + sign * length, 0);
      colours.I.forEach((at, i) => gradient.addColorStop(at / 255, `rgb(${colours.R[i]} ${colours.G[i]} ${colours.B[i]})`));
      paper.fillStyle = gradient;
      paper.fillRect(sign < 0 ? zero - length : zero, top, length, height);
      paper.fillStyle = "#33383d";
      paper.fillRect(sign < 0 ? zero - (length * shown) / limit : zero, top, (length * shown) / limit, height);
    }
    const texts = this.#endTexts();
    paper.fillStyle = "#fff";
    texts.forEach((text, i) => {
      paper.textAlign = i === 0 ? "left" : i === texts.length - 1 ? "right" : "center";
      paper.fillText(text, left + (width * i) / (texts.length - 1), top + height + 0.2 * line);
    });
    paper.textAlign = "left";
  }

  #buildBar() {
    this.#bar.hidden = !this.#overlay;
    if (!this.#overlay) return;
    const half = (sign) => make("span", { className: `panel-half ${sign}` }, make("span", { className: "panel-hidden" }));
    this.#bar.replaceChildren(
      make("div", { className: "panel-colours", "aria-hidden": "true" }, ...(this.#overlay.isSigned ? [half("negative")] : []), half("positive")),
      make("div", { className: "panel-ends" }, ...this.#endTexts().map((text) => make("span", {}, text))),
      make("div", { className: "panel-scale" }, this.#scaleText()));
  }

  // Sagittal slices count from the patient's right, as they appear from left to right.
  #index(axis, value) {
    return axis === 0 ? this.nv.volumes[0].dimsRAS[1] - 1 - value : value;
  }

  #moveTo(axis, value) {
    const position = [...this.nv.scene.crosshairPos];
    position[axis] = (this.#index(axis, value) + 0.5) / this.nv.volumes[0].dimsRAS[axis + 1];
    this.nv.scene.crosshairPos = position;
    this.nv.drawScene();
    this.#tell();
  }

  #mm() {
    return [...this.nv.frac2mm(this.nv.scene.crosshairPos, 0, true)].slice(0, 3);
  }

  #goTo(mm) {
    this.nv.scene.crosshairPos = [...this.nv.mm2frac(mm, 0, true)].map((share) => Math.min(Math.max(share, 0), 1));
    this.nv.drawScene();
    this.#tell();
  }

  #slice(axis) {
    const length = this.nv.volumes[0].dimsRAS[axis + 1];
    const index = Math.floor(this.nv.scene.crosshairPos[axis] * length);
    return this.#index(axis, Math.min(Math.max(index, 0), length - 1));
  }

  #press(event) {
    const isCombined = (event.ctrlKey || event.metaKey || event.altKey) && !event.getModifierState("AltGraph"); // which types [
    if (event.key === "Tab" || event.key === "Escape" || isCombined) return;
    event.stopPropagation(); // NiiVue has keys of its own, which no help names
    const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowDown: [2, -1], ArrowUp: [2, 1], PageDown: [1, -1], PageUp: [1, 1] };
    const frames = { "[": -1, "]": 1 };
    if (event.key in moves) {
      const [axis, step] = moves[event.key];
      const last = this.nv.volumes[0].dimsRAS[axis + 1] - 1;
      this.#moveTo(axis, Math.min(Math.max(this.#slice(axis) + step, 0), last));
    } else if (event.key in frames) this.setFrame(this.nv.volumes[0].frame4D + frames[event.key]);
    else if (event.key.toLowerCase() === "r") this.reset();
    else return;
    event.preventDefault();
  }

  // Write the position and the values there, and move the sliders to it.
  #tell() {
    const { nv } = this;
    if (!nv.volumes.length) return;
    PLANES.forEach(({ name }, axis) => this.#sliders[name].set(this.#slice(axis)));
    const [volume] = nv.volumes;
    this.#sliders.frame?.set(volume.frame4D);
    this.#sliders.black?.set(volume.cal_min);
    this.#sliders.white?.set(volume.cal_max);
    const mm = this.#mm();
    const values = nv.volumes.map((one) => one.getValue(...one.mm2vox(mm), one.frame4D));
    const place = this.isOriented
      ? `x, y, z: ${mm.map((at) => at.toFixed(1).replace(/^-0\.0$/, "0.0")).join(", ")} mm${this.origin && ` from ${this.origin}`}`
      : "orientation unknown: the file does not say which side is which";
    const shown = values.map((value, i) => `${i ? "map" : "value"} ${shortNumber(value)}${i ? ` ${this.#overlay.unit}` : ""}`);
    this.#readout.textContent = [place, ...shown].join(" · ").trim();
  }
}

// Put a panel into `host` and load its volume. Rejects if the browser cannot draw or a scan cannot be read.
async function openPanel(host, { title, volume, overlay = null, at = [0.5, 0.5, 0.5], origin = "" }) {
  if (!canDrawScans()) throw new Error("this browser has no WebGL 2, which draws the scans");
  const panel = new Panel(host, title, at, origin);
  try {
    await panel.start(volume, overlay);
  } catch (error) {
    panel.close(); // browsers have few canvases to draw in
    throw error;
  }
  return panel;
}
