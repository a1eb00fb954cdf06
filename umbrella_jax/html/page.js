// Sorts and filters the tables of a page, reads its charts, and opens its scans. Everything is legible without it.
"use strict";

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// Tables: a button in each heading sorts by its column; a search field and a menu for each choice filter the rows.
// Only the first rows are in the page, because browsers take seconds to lay out thousands.

const ROWS_SHOWN = 200;

function valueOf(cell) {
  if (cell.dataset.key !== undefined) return Number(cell.dataset.key);
  return cell.textContent.trim();
}

const collator = new Intl.Collator("en", { numeric: true });

function compare(a, b) {
  return typeof a === "number" && typeof b === "number" ? a - b : collator.compare(a, b);
}

// Whether a number is between two ends, of which an empty one is open; an unknown value only if both are.
function isWithin(value, from, to) {
  if (from === "" && to === "") return true;
  return typeof value === "number" && (from === "" || value >= Number(from)) && (to === "" || value <= Number(to));
}

function enableTable(box) {
  const table = box.querySelector("table");
  const headings = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  const cellTexts = (row) => [...row.cells].map((cell) => cell.textContent.trim());
  let rows = [...body.rows].map((row) => ({ row, texts: cellTexts(row), words: cellTexts(row).join("\n").toLowerCase() }));
  let limit = ROWS_SHOWN;
  const status = element("output");
  const search = element("input", { type: "search" });
  const more = element("button", { type: "button" }, `Show ${ROWS_SHOWN} more`);
  const controls = element("div", { className: "controls" }, element("label", {}, "Search rows ", search));
  const menus = [];
  const ranges = [];

  function show() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const matching = rows.filter(({ row, texts, words: text }) => words.every((word) => text.includes(word)) &&
      menus.every(([column, menu]) => menu.value === "" || texts[column] === menu.value) &&
      ranges.every(([column, from, to]) => isWithin(valueOf(row.cells[column]), from.value, to.value)));
    body.replaceChildren(...matching.slice(0, limit).map(({ row }) => row));
    more.hidden = matching.length <= limit;
    const [found, all] = [matching.length, rows.length].map((count) => count.toLocaleString("en"));
    status.textContent = `${found} of ${all} rows${more.hidden ? "" : `, the first ${limit} shown`}`;
  }

  function startOver() {
    limit = ROWS_SHOWN;
    show();
  }

  function sort(column) {
    const descending = headings[column].getAttribute("aria-sort") === "ascending";
    const keyed = rows.map((entry) => [valueOf(entry.row.cells[column]), entry]);
    const known = keyed.filter(([value]) => value !== "").sort(([a], [b]) => compare(a, b) * (descending ? -1 : 1));
    rows = [...known, ...keyed.filter(([value]) => value === "")].map(([, entry]) => entry); // unknown ones last
    headings.forEach((heading) => heading.removeAttribute("aria-sort"));
    headings[column].setAttribute("aria-sort", descending ? "descending" : "ascending");
    startOver();
    status.textContent += `, sorted by ${headings[column].textContent}, ${descending ? "descending" : "ascending"}`;
  }

  headings.forEach((heading, column) => {
    const name = heading.textContent;
    if (heading.classList.contains("choice")) {
      const values = [...new Set(rows.map(({ texts }) => texts[column]))].sort(compare);
      const menu = element("select", {}, element("option", { value: "" }, "all"),
        ...values.filter(Boolean).map((value) => element("option", { value }, value)));
      menu.addEventListener("change", startOver);
      menus.push([column, menu]);
      controls.append(element("label", {}, `${name} `, menu));
    }
    if (heading.classList.contains("range")) {
      const ends = ["from", "to"].map((end) => {
        const field = element("input", { type: "number", step: "any" });
        field.setAttribute("aria-label", `${name} ${end}`);
        field.addEventListener("input", startOver);
        return field;
      });
      ranges.push([column, ...ends]);
      controls.append(element("span", {}, `${name} from `, ends[0], " to ", ends[1]));
    }
    const button = element("button", { type: "button" }, name);
    button.addEventListener("click", () => sort(column));
    heading.replaceChildren(button);
  });
  search.addEventListener("input", startOver);
  more.addEventListener("click", () => {
    limit += ROWS_SHOWN;
    show();
  });
  controls.append(status);
  box.prepend(controls);
  box.append(more);
  show();
}

// Charts: a slider and the pointer read the values at a step; smoothing and a logarithmic axis on demand.

const SVG = "http://www.w3.org/2000/svg";

function drawn(tag, attributes, text) {
  const made = document.createElementNS(SVG, tag);
  Object.entries(attributes).forEach(([name, value]) => made.setAttribute(name, value));
  if (text !== undefined) made.textContent = text;
  return made;
}

// Means over earlier values, whose weights fall by `weight` from step to step, corrected for the start.
function smoothed(points, weight) {
  let [sum, total] = [0, 0];
  return points.map(([step, value]) => {
    sum = weight * sum + (1 - weight) * value;
    total = weight * total + (1 - weight);
    return [step, sum / total];
  });
}

function nearest(points, step) {
  return points.reduce((best, point) => (Math.abs(point[0] - step) < Math.abs(best[0] - step) ? point : best));
}

function enableChart(figure) {
  const { box: [left, right, top, bottom], last, marks, start, scales, lines } = JSON.parse(figure.dataset.chart);
  const svg = figure.querySelector("svg");
  const [ticks, paths] = [svg.querySelector(".ticks"), svg.querySelector(".lines")];
  const cursor = drawn("g", { class: "cursor" });
  svg.append(cursor);
  const steps = [...new Set(lines.flatMap(({ points }) => points.map(([step]) => step)))].sort((a, b) => a - b);
  let scale = scales[start];
  let isLogarithmic = start === "logarithmic";
  let weight = 0;
  const x = (step) => left + ((right - left) * step) / last;
  const y = (value) => {
    const [low, high, at] = [scale.low, scale.high, Math.max(value, scale.low)].map((one) => (isLogarithmic ? Math.log(one) : one));
    return bottom - (bottom - top) * Math.min((at - low) / (high - low), 1);
  };
  const path = (points) => `M${points.map(([step, value]) => `${x(step).toFixed(1)},${y(value).toFixed(1)}`).join("L")}`;
  const shown = lines.map(({ points }) => points);

  function draw() {
    ticks.replaceChildren(...scale.ticks.flatMap(([value, text]) => [
      drawn("line", { class: "grid", x1: left, x2: right, y1: y(value), y2: y(value) }),
      drawn("text", { x: left - 7, y: y(value) + 4, "text-anchor": "end" }, text)]));
    paths.replaceChildren(...lines.flatMap(({ points, level }, i) => {
      shown[i] = weight ? smoothed(points, weight) : points;
      const look = `stroke-${i % 4} dash-${Math.floor(i / 4) % 3}`;
      return [
        ...(level === null ? [] : [drawn("path", { class: `stroke-${i % 4} level`, d: `M${left},${y(level)}H${right}` })]),
        ...(weight ? [drawn("path", { class: `${look} raw`, d: path(points) })] : []),
        drawn("path", { class: look, d: path(shown[i]) }),
        ...(marks || points.length === 1 ? points.map(([step, value]) => drawn("circle", { class: `set-${i % 4}`, cx: x(step), cy: y(value), r: 3 })) : []),
      ];
    }));
    read();
  }

  const reader = element("input", { type: "range", min: 0, max: steps.length - 1, step: 1, value: steps.length - 1 });
  reader.setAttribute("aria-label", `step of ${figure.querySelector("b").textContent}`);
  const readout = element("output", { className: "chart-values" });

  function read() {
    const step = steps[Number(reader.value)];
    const values = lines.map(({ name }, i) => {
      const [at, value] = nearest(shown[i], step);
      return { i, at, value, text: `${name} ${value.toPrecision(4)}${at === step ? "" : ` (step ${at})`}`.trim() };
    });
    cursor.replaceChildren(drawn("line", { x1: x(step), x2: x(step), y1: top, y2: bottom }),
      ...values.map(({ i, at, value }) => drawn("circle", { class: `set-${i % 4}`, cx: x(at), cy: y(value), r: 4 })));
    readout.textContent = `step ${step.toLocaleString("en")}: ${values.map(({ text }) => text).join(", ")}`;
    reader.setAttribute("aria-valuetext", readout.textContent);
  }

  svg.addEventListener("pointermove", (event) => {
    const frame = svg.getBoundingClientRect();
    const at = ((((event.clientX - frame.left) / frame.width) * svg.viewBox.baseVal.width - left) / (right - left)) * last;
    reader.value = steps.indexOf(nearest(steps.map((step) => [step]), at)[0]);
    read();
  });
  reader.addEventListener("input", read);
  const controls = element("div", { className: "controls" }, reader);
  if (lines.some(({ points }) => points.length > 4)) {
    const smoothing = element("input", { type: "range", min: 0, max: 0.98, step: 0.02, value: 0 });
    smoothing.addEventListener("input", () => {
      weight = Number(smoothing.value);
      draw();
    });
    controls.append(element("label", {}, "smooth ", smoothing));
  }
  if (scales.logarithmic) {
    const choice = element("input", { type: "checkbox", checked: isLogarithmic });
    choice.addEventListener("change", () => {
      isLogarithmic = choice.checked;
      scale = scales[isLogarithmic ? "logarithmic" : "linear"];
      draw();
    });
    controls.append(element("label", {}, choice, " logarithmic"));
  }
  svg.after(readout, controls);
  draw();
}

// Scans: a panel takes the place of the pictures when it comes into view. Browsers draw few at a time, so the panel that
// was out of view for longest becomes pictures again.

const MOST_PANELS = 6;
const openPanels = new Map();
let unpacking = null;
let queue = Promise.resolve();

function bytesOf(name) {
  return Uint8Array.from(atob(document.getElementById(name).content.textContent), (letter) => letter.charCodeAt(0));
}

async function unpackNiivue() {
  const stream = new Blob([bytesOf("niivue")]).stream().pipeThrough(new DecompressionStream("gzip"));
  document.head.append(element("script", { textContent: await new Response(stream).text() })); // its hash is in the policy
}

async function openScan(box) {
  if (openPanels.has(box) || !box.isVisible) return;
  await (unpacking ??= unpackNiivue());
  while (openPanels.size >= MOST_PANELS) {
    const hidden = [...open.keys()].find((other) => !other.isVisible);
    if (!hidden) return;
    closeScan(hidden);
  }
  const { title, volume, overlay, unit, limit, at } = box.dataset;
  const host = element("div");
  box.prepend(host);
  try {
    openPanels.set(box, await openPanel(host, {
      title,
      volume: { bytes: bytesOf(volume).buffer },
      overlay: overlay && { bytes: bytesOf(overlay).buffer, unit, limit: Number(limit) },
      at: at ? at.split(" ").map(Number) : undefined,
      origin: "the centre",
    }));
    box.classList.add("is-open");
  } catch (error) {
    host.replaceWith(element("p", { className: "facts" }, `Pictures only: ${error.message}`));
    scans.unobserve(box);
  }
}

function closeScan(box) {
  openPanels.get(box).close();
  openPanels.delete(box);
  box.firstElementChild.remove();
  box.classList.remove("is-open");
}

// What scrolls sideways can be scrolled by keyboard, and what fits is no stop for it.
const scrolling = new ResizeObserver((entries) => entries.forEach(({ target }) => {
  if (target.scrollWidth > target.clientWidth || target.closest(".data")) target.tabIndex = 0;
  else target.removeAttribute("tabindex");
}));

document.querySelectorAll(".data").forEach(enableTable);
document.querySelectorAll(".scroll, pre").forEach((box) => {
  if (box.closest("details:not([open])")) box.tabIndex = 0; // what is folded is measured when it opens
  scrolling.observe(box);
});
document.querySelectorAll(".curves").forEach(enableChart);
const scans = new IntersectionObserver((entries) => entries.forEach(({ target, isIntersecting }) => {
  target.isVisible = isIntersecting;
  if (isIntersecting) queue = queue.then(() => openScan(target));
}), { rootMargin: "300px" });
document.querySelectorAll(".scan[data-volume]").forEach((box) => scans.observe(box));
