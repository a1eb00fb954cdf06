// The scans that are open: each in a panel, with its modality, what the model sees of it, and maps laid over it.

import { announce, button, byId, element, keepFocus, showError } from "/static/elements.js";
import { deleteScan, getBytes, listScans, ServerError, uploadScan } from "/static/requests.js";

const MOST_OPEN = 8; // browsers draw in at most 16 canvases with WebGL

// A scan on the page. `modality` is empty until a person has chosen or confirmed it.
class OpenScan {
  constructor(facts, number, modalities, changed, close, remove) {
    Object.assign(this, { facts, number, modalities, changed });
    this.modality = facts.modality ?? "";
    this.isIncluded = true;
    this.isSeen = false;
    this.isGone = false; // from the server
    this.isClosed = false;
    this.window = 0;
    this.map = null;
    this.label = `Scan ${number}`;
    this.panel = null;
    this.waiting = Promise.resolve();
    this.host = element("div", { className: "panel-host" });
    this.error = element("div", { role: "alert" });
    this.modalityError = element("div", { role: "alert" });
    const title = element("h3", { id: `scan-${number}` }, `${this.label} `, element("span", { className: "name" }, facts.name));
    this.card = element("article", { className: "open-scan card", "aria-labelledby": `scan-${number}` },
      element("div", { className: "card-head" }, title, element("div", { className: "row" },
        facts.uploaded ? button("Delete", remove, { "aria-label": `Delete ${this.label} from the server` }) : null,
        button("Close", close, { "aria-label": `Close ${this.label}` }))),
      element("p", { className: "facts" }, this.#describe()),
      ...this.#warn(), this.#modalityChoice(), this.#views(), this.host, this.error);
  }

  #describe() {
    const { shape, zooms_mm: zooms, orientation, frames, tr } = this.facts;
    const parts = [];
    if (shape) parts.push(`${shape.join(" × ")} voxels`);
    if (zooms) parts.push(`${zooms.slice(0, 3).map((mm) => Number(mm.toFixed(2))).join(" × ")} mm`);
    if (frames > 1) parts.push(`${frames} frames${tr ? `, one each ${Number(tr.toFixed(3))} s` : ""}`);
    if (shape) parts.push(orientation ? `axes to ${orientation}` : "orientation unknown");
    return parts.join(" · ") || "The server cannot read this file.";
  }

  #warn() {
    const { warnings = [] } = this.facts;
    if (!warnings.length) return [];
    return [element("ul", { className: "warnings" }, ...warnings.map((text) => element("li", {}, text)))];
  }

  #modalityChoice() {
    const { guess } = this.facts;
    const options = this.modalities.map(({ name, trained, ndim }) => {
      const kind = ndim === 4 ? "runs" : "volumes";
      const option = element("option", { value: name }, `${name} (${kind}${trained === false ? ", not trained" : ""})`);
      option.disabled = trained === false;
      return option;
    });
    this.menu = element("select", {}, element("option", { value: "" }, "choose…"), ...options);
    this.menu.value = this.modality;
    this.menu.addEventListener("change", () => this.setModality(this.menu.value));
    this.guess = element("p", { className: "guess", hidden: !guess || Boolean(this.modality) });
    if (guess) {
      const confirm = button(`Yes, ${guess.modality}`, () => {
        this.setModality(guess.modality);
        keepFocus(this.menu);
      }, { className: "primary" });
      this.guess.append(`Probably ${guess.modality}: ${guess.reason}. `, confirm);
    }
    const source = this.facts.modality ? element("span", { className: "small" }, "as in the data") : null;
    return element("div", { className: "modality" },
      element("div", { className: "row" }, element("label", {}, "Modality ", this.menu), source), this.guess, this.modalityError);
  }

  #views() {
    const views = [["The file", false], ["What the model sees", true]];
    this.viewButtons = views.map(([text, isSeen]) => button(text, () => this.show(isSeen), { "aria-pressed": String(!isSeen) }));
    const windows = element("input", { type: "number", min: "0", value: "0", step: "1" });
    windows.addEventListener("change", () => {
      this.window = Math.max(0, Math.floor(Number(windows.value)) || 0);
      this.show(true);
    });
    this.windowLabel = element("label", { hidden: true }, "window, from 0 ", windows);
    this.seenNote = element("p", { className: "small", hidden: true });
    return element("div", {},
      element("div", { className: "row views", role: "group", "aria-label": `View of ${this.label}` }, ...this.viewButtons, this.windowLabel),
      this.seenNote);
  }

  setModality(name) {
    this.modality = this.menu.value = name;
    this.guess.hidden = Boolean(name) || !this.facts.guess;
    this.modalityError.replaceChildren();
    if (this.isSeen) this.show(Boolean(name));
    this.changed();
  }

  askForModality() {
    showError(this.modalityError, new ServerError("Choose the modality; the model reads each in its own way."));
    this.menu.focus();
  }

  // Show the file, or what the model sees of it. Loads run one after the other.
  show(isSeen) {
    this.waiting = this.waiting.then(() => this.#show(isSeen)).catch((error) => showError(this.error, error, () => this.show(isSeen)));
    return this.waiting;
  }

  async #show(isSeen) {
    if (isSeen && !this.modality) {
      this.askForModality();
      return;
    }
    this.error.replaceChildren();
    this.isSeen = isSeen;
    this.#setMap(null);
    this.viewButtons.forEach((one, i) => one.setAttribute("aria-pressed", String(Boolean(i) === isSeen)));
    const config = this.modalities.find(({ name }) => name === this.modality);
    this.windowLabel.hidden = !isSeen || config.ndim !== 4;
    this.seenNote.hidden = !isSeen;
    if (isSeen) {
      this.seenNote.textContent = `Turned, resampled and scaled as ${config.name}: ${config.size.join(" × ")} voxels, in patches of `
        + `${config.patch.join(" × ")}. Check that front, top and left are where they belong.`;
    }
    const id = encodeURIComponent(this.facts.id);
    const query = new URLSearchParams({ modality: this.modality, window: String(this.window) });
    const volume = { bytes: await getBytes(isSeen ? `/api/scans/${id}/seen?${query}` : `/api/scans/${id}/file`) };
    if (this.isClosed) return;
    if (this.panel) {
      await this.panel.setVolume(volume);
      return;
    }
    const panel = await openPanel(this.host, { title: `${this.label}: ${this.facts.name}`, volume }).catch((error) => {
      const remedy = error.message.includes("WebGL")
        ? "You can ask about the scan all the same. To see it, turn hardware acceleration on, or use another browser."
        : "Copy the file again; `umbrella-jax data validate` says more.";
      throw new ServerError(`Not shown: ${error.message}`, { remedy });
    });
    if (this.isClosed) panel.close(); // while it opened
    else this.panel = panel;
  }

  // Lay a map over the file; null removes it.
  async showMap(map) {
    if (!map && !this.map) return;
    if (map && (this.isSeen || !this.panel)) await this.show(false);
    this.waiting = this.waiting.then(async () => {
      const overlay = map && { bytes: await getBytes(map.url), unit: map.unit };
      if (!this.panel || this.isClosed) return;
      await this.panel.setOverlay(overlay);
      this.#setMap(map?.url ?? null);
    }).catch((error) => showError(this.error, error));
    await this.waiting;
  }

  #setMap(url) {
    if (this.map === url) return;
    this.map = url;
    this.changed();
  }

  // The server no longer has it: it can be looked at, but not be asked about.
  setGone() {
    if (this.isGone) return;
    this.isGone = true;
    this.isIncluded = false;
    showError(this.error, new ServerError("The server no longer has this scan, so you cannot ask about it.", {
      remedy: "Uploads are removed after an hour, and when the server ends. Close it, and open it again.",
    }));
    this.changed();
  }

  close() {
    this.isClosed = true;
    this.panel?.close();
    this.card.remove();
  }
}

// All open scans, the field to drop files on, and the list of scans on the server.
export class Scans {
  #modalities;
  #changed;
  #known = [];
  #isCut = false; // whether --data has more scans than the server lists
  #count = 0;
  #uploading = Promise.resolve();

  constructor(modalities, changed) {
    this.#modalities = modalities;
    this.#changed = changed;
    this.open = [];
    byId("files").addEventListener("change", (event) => {
      this.#enqueue([...event.target.files]);
      event.target.value = "";
    });
    byId("search").addEventListener("input", () => this.#list());
    byId("known").addEventListener("change", () => { byId("show-known").disabled = !byId("known").value; });
    byId("known").addEventListener("dblclick", () => this.#openKnown());
    byId("known").addEventListener("keydown", (event) => { if (event.key === "Enter") this.#openKnown(); });
    byId("show-known").addEventListener("click", () => this.#openKnown());
    byId("search").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || byId("known").length !== 1) return;
      byId("known").selectedIndex = 0;
      this.#openKnown();
    });
    // Another tab may have changed the list, and time removes uploads.
    document.addEventListener("visibilitychange", () => document.hidden || this.refresh());
    this.#acceptDrops();
  }

  // Fetch the list of scans that the server has, and mark open scans that it no longer has.
  async refresh() {
    const [status, errors] = [byId("upload-status"), byId("upload-errors")];
    const before = new Set(this.#known.map(({ id }) => id)); // what is uploaded from now on may be missing in the list
    const waiting = setTimeout(() => { status.textContent = "Reading the list of scans on the server…"; }, 500);
    try {
      const { known, isCut } = await listScans();
      known.sort((a, b) => a.uploaded - b.uploaded || a.name.localeCompare(b.name, "en", { numeric: true }));
      const ids = new Set(known.map(({ id }) => id));
      this.#known = [...known, ...this.#known.filter(({ id }) => !before.has(id) && !ids.has(id))];
      this.#isCut = isCut;
      this.#list();
      this.open.filter(({ facts: { id } }) => before.has(id) && !ids.has(id)).forEach((scan) => scan.setGone());
    } catch (error) {
      showError(errors, error, () => this.refresh());
    } finally {
      clearTimeout(waiting);
      if (status.textContent.startsWith("Reading the list")) status.textContent = "";
    }
  }

  #acceptDrops() {
    const drop = byId("drop");
    let depth = 0;
    const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
    const mark = (change) => {
      depth = Math.max(0, depth + change);
      drop.classList.toggle("is-over", depth > 0);
    };
    // Anywhere on the page: the browser would open a file that misses the field.
    document.addEventListener("dragenter", (event) => hasFiles(event) && mark(1));
    document.addEventListener("dragleave", (event) => hasFiles(event) && mark(-1));
    document.addEventListener("dragover", (event) => hasFiles(event) && event.preventDefault());
    document.addEventListener("drop", (event) => {
      if (!hasFiles(event)) return;
      event.preventDefault();
      mark(-depth);
      this.#enqueue([...event.dataTransfer.files]);
    });
  }

  #enqueue(files) {
    this.#uploading = this.#uploading.then(() => this.#upload(files));
  }

  async #upload(files) {
    const [status, errors] = [byId("upload-status"), byId("upload-errors")];
    errors.replaceChildren();
    for (const [i, file] of files.entries()) {
      status.textContent = `Reading ${file.name}${files.length > 1 ? ` (${i + 1} of ${files.length})` : ""}…`;
      try {
        this.#checkRoom();
        const facts = await uploadScan(file);
        this.#known.push(facts);
        this.add(facts);
      } catch (error) {
        const place = element("div");
        errors.append(place);
        if (!error.message.includes(file.name)) error.message = `${file.name}: ${error.message}`;
        showError(place, error);
      }
    }
    status.textContent = "";
    this.#list();
  }

  #list() {
    const words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const closed = this.#known.filter(({ id }) => !this.open.some((scan) => scan.facts.id === id));
    const title = ({ name, modality, shape }) => `${modality ?? "uploaded"}${shape ? "" : ", cannot be read"} · ${name}`;
    const matching = closed.filter((facts) => words.every((word) => title(facts).toLowerCase().includes(word)));
    const options = matching.map((facts) => element("option", { value: facts.id }, title(facts)));
    byId("known").replaceChildren(...options);
    byId("choose").hidden = !closed.length;
    byId("show-known").disabled = true;
    byId("known-count").textContent = `${matching.length} of ${closed.length}`
      + (this.#isCut ? "; the data has more scans, which are not listed: serve a smaller file" : "");
  }

  #openKnown() {
    const facts = this.#known.find(({ id }) => id === byId("known").value);
    if (!facts) return;
    const errors = byId("upload-errors");
    errors.replaceChildren();
    try {
      this.#checkRoom();
      this.add(facts);
      byId("search").value = "";
      this.#list();
      keepFocus(byId("choose").hidden ? byId("files") : byId("search"));
    } catch (error) {
      showError(errors, error);
    }
  }

  #checkRoom() {
    if (this.open.length < MOST_OPEN) return;
    throw new ServerError(`${MOST_OPEN} scans are open, as many as browsers can draw.`, { remedy: "Close one first." });
  }

  add(facts) {
    const scan = new OpenScan(facts, ++this.#count, this.#modalities, this.#changed, () => this.#close(scan), () => this.#delete(scan));
    this.open.push(scan);
    byId("empty").hidden = true;
    byId("cards").append(scan.card);
    announce(`${scan.label}, ${facts.name}, is open.`);
    scan.show(false);
    this.#changed();
    return scan;
  }

  #close(scan) {
    this.open = this.open.filter((one) => one !== scan);
    scan.close();
    byId("empty").hidden = this.open.length > 0;
    this.#list();
    announce(`${scan.label} is closed.`);
    this.#changed();
    byId("files").focus({ preventScroll: true });
  }

  async #delete(scan) {
    try {
      await deleteScan(scan.facts.id);
    } catch (error) {
      if (error.status !== 404) { // 404: it has expired
        showError(scan.error, error);
        return;
      }
    }
    this.#known = this.#known.filter(({ id }) => id !== scan.facts.id);
    this.#close(scan);
  }
}
