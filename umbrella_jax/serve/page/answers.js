// An answer on the page: its text as it comes, likelihoods, numbers, the answer without the scan, and why.

import { announce, button, element, keepFocus, percent, shortNumber, showError } from "/static/elements.js";
import { numberFigure } from "/static/numbers.js";
import { streamEvents } from "/static/requests.js";

const METHODS = {
  integrated: { name: "integrated gradients", says: "Integrated gradients: the voxels of all maps add up to the effect of the scans." },
  gradient: { name: "gradient, fastest", says: "Gradient times voxel: fast, and true for small changes of the scan only." },
  occlusion: { name: "occlusion, slowest", says: "Occlusion: how the likelihood changes as one patch after the other is hidden." },
};
const UNIT = "nats"; // of log-probabilities

// Ask, show the text in `place` as it comes, and return {text, extra}, with `extra` the answer's field `umbrella`.
async function streamAnswer(body, place, signal) {
  const text = document.createTextNode("");
  place.replaceChildren(text);
  place.setAttribute("aria-busy", "true");
  let [extra, reason] = [{}, "stop"];
  try {
    for await (const chunk of streamEvents("/v1/chat/completions", { ...body, stream: true }, signal)) {
      const choice = chunk.choices?.[0];
      text.data += choice?.delta?.content ?? "";
      reason = choice?.finish_reason ?? reason;
      Object.assign(extra, chunk.umbrella);
    }
  } finally {
    place.setAttribute("aria-busy", "false");
  }
  if (!text.data) place.replaceChildren(element("em", {}, "an empty answer"));
  else if (reason === "length") place.append(element("small", { className: "cut" }, "Cut off; a longer answer can be allowed below."));
  return { text: text.data, extra };
}

function bar(share, kind) {
  const made = element("span", { className: `bar ${kind}` });
  made.style.width = `${100 * share}%`;
  return element("span", { className: "bar-track", "aria-hidden": "true" }, made);
}

function likelihoodTable(likelihoods, blank) {
  const without = new Map((blank ?? []).map(({ answer, probability }) => [answer, probability]));
  const rows = [...likelihoods].sort((a, b) => b.probability - a.probability).map(({ answer, probability }) => {
    const cells = [element("td", {}, percent(probability)), element("td", { className: "bars" }, bar(probability, "with"))];
    if (blank) {
      cells[1].append(bar(without.get(answer) ?? 0, "without"));
      cells.push(element("td", {}, percent(without.get(answer) ?? 0)));
    }
    return element("tr", {}, element("th", { scope: "row" }, answer), ...cells);
  });
  const heads = ["answer", blank ? "with the scan" : "likelihood", "bars", ...(blank ? ["without"] : [])];
  return element("div", { className: "scroll likelihoods" }, element("table", {},
    element("caption", {}, "Likelihood of each answer, among these"),
    element("thead", {}, element("tr", {}, ...heads.map((name) => element("th", { scope: "col" }, name === "bars" ? element("span", { className: "unseen" }, name) : name)))),
    element("tbody", {}, ...rows)));
}

// A question with its answer. `scans` are those of the question, `open()` those that are open now; `ended` is the signal
// that the conversation is over, which ends all requests about it.
export class Answer {
  constructor({ question, scans, body, unit, hasScans, open, ended }) {
    Object.assign(this, { question, scans, body, unit, open, hasScans, ended });
    this.result = null;
    this.blank = null;
    this.explanation = null;
    this.mapRows = [];
    this.stopper = new AbortController();
    this.text = element("div", { className: "answer-text", "aria-live": "polite" });
    this.blankText = element("div", { className: "answer-text" });
    this.blankBox = element("div", { className: "without-box", hidden: true, tabIndex: -1 },
      element("h4", {}, "Without the scan"), this.blankText, element("p", { className: "small" }, "Each scan was replaced by background."));
    this.details = element("div");
    this.error = element("div", { role: "alert" });
    this.stop = button("Stop", () => this.stopper.abort());
    this.actions = element("div", { className: "row actions", hidden: true });
    this.why = element("div", { className: "why", hidden: true });
    const used = scans.length ? element("p", { className: "small" }, `with ${scans.map(({ label, modality }) => `${label} (${modality})`).join(", ")}`) : null;
    this.item = element("li", { className: "exchange" },
      element("div", { className: "question" }, element("p", {}, question), used),
      element("div", { className: "answer card" },
        element("div", { className: "pair" }, element("div", {}, element("h3", {}, "Answer"), this.text), this.blankBox),
        this.stop, this.details, this.error, this.actions, this.why));
  }

  // What is saved of it.
  toJson() {
    const { answer, log_probability: withScan, without, method } = this.explanation ?? {};
    return {
      question: this.question,
      scans: this.scans.map(({ label, modality, facts }) => ({ label, modality, name: facts.name })),
      answer: this.result?.text ?? null,
      ...this.result?.extra,
      ...(this.blank && { without_the_scan: { answer: this.blank.text, ...this.blank.extra } }),
      ...(this.explanation && { explanation: { answer, method, log_probability: withScan, log_probability_without: without } }),
    };
  }

  // Say on the buttons of the maps what they do now.
  update() {
    this.mapRows.forEach(({ update }) => update());
  }

  async #stream(body, place) {
    this.stopper = new AbortController();
    this.stop.hidden = false;
    try {
      return await streamAnswer(body, place, AbortSignal.any([this.stopper.signal, this.ended]));
    } finally {
      this.stop.hidden = true;
    }
  }

  // Ask; the text of the answer, or null if it was stopped.
  async run() {
    this.error.replaceChildren();
    try {
      this.result = await this.#stream(this.body, this.text);
    } catch (error) {
      if (error.name !== "AbortError") throw error;
      this.text.append(element("small", { className: "cut" }, "Stopped. The conversation goes on without it."));
      return null;
    }
    this.#show();
    this.#offer();
    return this.result.text;
  }

  #show() {
    const { likelihoods, numbers } = this.result.extra;
    const blank = this.blank?.extra;
    this.details.replaceChildren();
    if (likelihoods?.length) this.details.append(likelihoodTable(likelihoods, blank?.likelihoods));
    if (numbers) this.details.append(numberFigure(numbers, this.unit, blank?.numbers));
  }

  #offer() {
    if (!this.hasScans) return;
    const control = button("Without the scan", () => this.#askBlank(control));
    const method = element("select", { "aria-label": "Method" },
      ...Object.entries(METHODS).map(([value, { name }]) => element("option", { value }, name)));
    const start = button("Why this answer?", () => this.#explain(method.value, start));
    this.actions.replaceChildren(control, element("span", { className: "row" }, start, element("label", {}, "by ", method)));
    this.actions.hidden = false;
  }

  async #askBlank(control) {
    control.disabled = true;
    this.blankBox.hidden = false;
    this.error.replaceChildren();
    const body = { ...this.body, umbrella: { ...this.body.umbrella, control: "blank" } };
    try {
      this.blank = await this.#stream(body, this.blankText);
      this.#show();
      announce(`Without the scan the answer is: ${this.blank.text}`);
      control.remove();
      keepFocus(this.blankBox);
    } catch (error) {
      this.blankBox.hidden = true;
      control.disabled = false;
      if (error.name === "AbortError") keepFocus(control);
      else showError(this.error, error, () => this.#askBlank(control));
    }
  }

  async #explain(method, start) {
    const stopper = new AbortController();
    const meter = element("progress", { max: 1, "aria-label": "Progress of the explanation" });
    const state = element("span", { className: "small" }, "Waiting for its turn…");
    const cancel = button("Cancel", () => stopper.abort());
    this.why.hidden = false;
    this.why.replaceChildren(element("h4", {}, "Why"), element("div", { className: "row" }, meter, state, cancel));
    start.disabled = true;
    const { model, messages } = this.body;
    try {
      const signal = AbortSignal.any([stopper.signal, this.ended]);
      for await (const event of streamEvents("/v1/explain", { model, messages, answer: this.result.text, method }, signal)) {
        if (event.total) {
          Object.assign(meter, { max: event.total, value: event.done });
          state.textContent = `${event.done} of ${event.total} steps`;
        }
        if (event.maps) {
          await this.#showExplanation(event, method);
          break;
        }
      }
    } catch (error) {
      if (error.name === "AbortError") this.why.hidden = true;
      else showError(this.why, error, () => this.#explain(method, start));
    } finally {
      start.disabled = false;
      keepFocus(start);
    }
  }

  async #showExplanation(explanation, method) {
    const { log_probability: withScan, without, maps } = explanation;
    this.explanation = { ...explanation, method };
    const effect = withScan - without;
    const times = Math.exp(Math.abs(effect));
    const sentence = `With the scans, this answer is ${times > 1000 ? "more than 1000" : Number(times.toPrecision(2))} times `
      + `${effect < 0 ? "less" : "more"} likely than without them (${effect < 0 ? "−" : "+"}${shortNumber(Math.abs(effect))} ${UNIT}).`;
    const rows = this.mapRows = maps.map((map) => this.#mapRow(map, method));
    this.why.replaceChildren(element("h4", {}, "Why"), element("p", {}, sentence),
      element("p", { className: "small" }, `${METHODS[method].says} Red raises the likelihood of the answer, blue lowers it. `
        + "A map shows what this model used; it is no evidence about the patient."),
      element("ul", { className: "maps" }, ...rows.map(({ row }) => row)));
    for (const { show } of rows) await show();
    this.why.scrollIntoView({ block: "nearest" });
    announce("The explanation is laid over the scans.");
  }

  #mapRow(map, method) {
    const url = `/api/maps/${encodeURIComponent(map.id)}`;
    const scan = () => this.open().find(({ facts }) => facts.id === map.scan);
    const label = scan()?.label ?? map.name ?? "a scan";
    const status = element("span", { className: "small" });
    const toggle = button("", async () => {
      const target = scan();
      if (target) await target.showMap(target.map === url ? null : { url, unit: map.unit ?? `${UNIT} per voxel` });
    });
    const update = () => {
      const target = scan();
      toggle.disabled = !target;
      toggle.textContent = target?.map === url ? `Hide on ${label}` : `Show on ${label}`;
      status.textContent = target ? "" : "open the scan to see it";
    };
    const link = element("a", { href: url, download: `why_${method}_${label.replace(/\W+/g, "_")}.nii.gz` }, "Download as NIfTI");
    const show = () => scan()?.showMap({ url, unit: map.unit ?? `${UNIT} per voxel` });
    update();
    return { row: element("li", {}, toggle, " ", link, " ", status), show, update };
  }
}
