// Sorts and filters the tables of a page, reads its charts, and opens its scans. Everything is legible without it.
"use strict";

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// Offers a file that the page has made.
function save(name, content, type) {
  const url = URL.createObjectURL(content instanceof Blob ? content : new Blob([content], { type }));
  element("a", { href: url, download: name.replace(/[^\p{L}\p{N}._-]+/gu, "-") }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60000);
}

function saveButton(text, title, click) {
  const button = element("button", { type: "button", className: "quiet", title }, text);
  button.setAttribute("aria-label", title);
  button.addEventListener("click", click);
  return button;
}

function csvOf(rows) {
  const quoted = (text) => (/[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
  return rows.map((cells) => `${cells.map((cell) => quoted(String(cell))).join(",")}\r\n`).join("");
}

// Tables: a button in each heading sorts by its column; a search field, and a field or menu for each name, choice and range
// filter the rows. Only the first rows are in the page, because browsers take seconds to lay out thousands.

const ROWS_SHOWN = 200;

function valueOf(cell) {
  const { key } = cell.dataset;
  if (key !== undefined) return key === "" ? "" : Number(key);
  return cell.textContent.trim();
}

const collator = new Intl.Collator("en", { numeric: true });

function compare(a, b) {
  return typeof a === "number" && typeof b === "number" ? a - b : collator.compare(a, b);
}

// Whether a number is between two ends, of which an empty one is open; an unknown value is not.
function isWithin(value, from, to) {
  return typeof value === "number" && (from === "" || value >= Number(from)) && (to === "" || value <= Number(to));
}

function enableTable(box) {
  const table = box.querySelector("table");
  const headings = [...table.tHead.rows[0].cells];
  const names = headings.map((heading) => heading.textContent);
  const body = table.tBodies[0];
  const original = [...body.rows].map((row) => {
    const texts = [...row.cells].map((cell) => cell.textContent.trim());
    return { row, texts, lower: texts.map((text) => text.toLowerCase()) };
  });
  let rows = original;
  let limit = ROWS_SHOWN;
  const status = element("output");
  const more = element("button", { type: "button" }, `Show ${ROWS_SHOWN} more`);
  const reset = element("button", { type: "button", className: "quiet" }, "Clear filters and order");
  const controls = element("div", { className: "controls" });
  const fields = [];
  const filters = []; // each says whether an entry of `rows` is shown

  // A field that filters the rows as soon as it changes.
  function addField(field, name) {
    if (name) field.setAttribute("aria-label", name);
    field.addEventListener("input", startOver);
    fields.push(field);
    return field;
  }

  function words(field) {
    return field.value.toLowerCase().split(/\s+/).filter(Boolean);
  }

  function matching() {
    return filters.reduce((left, makeFilter) => {
      const filter = makeFilter();
      return filter ? left.filter(filter) : left;
    }, rows);
  }

  function show() {
    const found = matching();
    body.replaceChildren(...found.slice(0, limit).map(({ row }) => row));
    more.hidden = found.length <= limit;
    reset.hidden = rows === original && fields.every((field) => field.value === "");
    const [some, all] = [found.length, rows.length].map((count) => count.toLocaleString("en"));
    status.textContent = `${some} of ${all} rows${more.hidden ? "" : `, the first ${limit} shown`}`;
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
    status.textContent += `, sorted by ${names[column]}, ${descending ? "descending" : "ascending"}`;
  }

  const search = addField(element("input", { type: "search" }));
  controls.append(element("label", {}, "Search rows ", search));
  filters.push(() => {
    const wanted = words(search);
    return wanted.length && (({ lower }) => wanted.every((word) => lower.some((text) => text.includes(word))));
  });
  headings.forEach((heading, column) => {
    const name = names[column];
    const kind = ["name", "choice", "range"].find((one) => heading.classList.contains(one));
    if (kind === "name") {
      const field = addField(element("input", { type: "search" }));
      filters.push(() => {
        const wanted = words(field);
        return wanted.length && (({ lower }) => wanted.every((word) => lower[column].includes(word)));
      });
      controls.append(element("label", {}, `${name} `, field));
    } else if (kind === "choice") {
      const values = [...new Set(rows.map(({ texts }) => texts[column]))].sort(compare).filter(Boolean);
      const menu = addField(element("select", {}, element("option", { value: "" }, "all"),
        ...values.map((value) => element("option", { value }, value))));
      filters.push(() => menu.value && (({ texts }) => texts[column] === menu.value));
      controls.append(element("label", {}, `${name} `, menu));
    } else if (kind === "range") {
      const [from, to] = ["from", "to"].map((end) => addField(element("input", { type: "number", step: "any" }), `${name} ${end}`));
      filters.push(() => (from.value || to.value) && (({ row }) => isWithin(valueOf(row.cells[column]), from.value, to.value)));
      controls.append(element("span", { className: "range-fields" }, `${name} from `, from, " to ", to));
    }
    const button = element("button", { type: "button" }, name);
    button.addEventListener("click", () => sort(column));
    heading.replaceChildren(button);
  });
  more.addEventListener("click", () => {
    limit += ROWS_SHOWN;
    show();
  });
  reset.addEventListener("click", () => {
    fields.forEach((field) => { field.value = ""; });
    headings.forEach((heading) => heading.removeAttribute("aria-sort"));
    rows = original;
    startOver();
    search.focus(); // this button is gone
  });
  const saving = saveButton("Save as CSV", `Save as CSV the rows that match: ${table.caption.textContent}`, () =>
    save(`${table.id}.csv`, csvOf([names, ...matching().map(({ texts }) => texts)]), "text/csv"));
  controls.append(reset, saving, status);
  box.prepend(controls);
  box.append(more);
  show();
  box.classList.add("is-ready");
}

// Charts: a slider and the pointer read the values at a step, in all charts at once; smoothing and a logarithmic axis on
// demand; the names of curves are buttons that hide them. Every chart can be saved.

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

// The chart as a file of its own: what the page's style gives to its parts is written into them.
function svgFile(svg) {
  const copy = svg.cloneNode(true);
  copy.querySelector(".cursor")?.remove();
  const looks = ["fill", "stroke", "stroke-width", "stroke-dasharray", "opacity", "font-family", "font-size"];
  const originals = [...svg.querySelectorAll("*")].filter((part) => !part.closest(".cursor"));
  [...copy.querySelectorAll("*")].forEach((part, i) => {
    const style = getComputedStyle(originals[i]);
    looks.forEach((name) => part.setAttribute(name, style.getPropertyValue(name)));
    part.removeAttribute("class");
  });
  copy.setAttribute("xmlns", SVG);
  copy.prepend(drawn("rect", { width: "100%", height: "100%", fill: getComputedStyle(document.body).backgroundColor }));
  return new XMLSerializer().serializeToString(copy);
}

function addSaving(figure) {
  const { name } = figure.dataset;
  const buttons = [saveButton("SVG", `Save the chart as SVG: ${name}`, () => save(`${name}.svg`, svgFile(figure.querySelector("svg")), "image/svg+xml"))];
  if (figure.dataset.chart) {
    const { lines } = JSON.parse(figure.dataset.chart);
    const rows = lines.flatMap((line) => line.points.map(([step, value]) => [line.name || name, step, value]));
    buttons.push(saveButton("CSV", `Save the drawn points as CSV: ${name}`, () => save(`${name}.csv`, csvOf([["curve", "step", "value"], ...rows]), "text/csv")));
  }
  figure.querySelector("figcaption").append(element("span", { className: "saving" }, ...buttons));
}

const chartReaders = []; // of each chart a function that reads it at a step

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
    const within = Math.min(Math.max(value, scale.low), scale.high);
    const [low, high, at] = [scale.low, scale.high, within].map((one) => (isLogarithmic ? Math.log(one) : one));
    return bottom - ((bottom - top) * (at - low)) / (high - low);
  };
  const path = (points) => `M${points.map(([step, value]) => `${x(step).toFixed(1)},${y(value).toFixed(1)}`).join("L")}`;
  const shown = lines.map(({ points }) => points);
  const hidden = new Set();

  function draw() {
    ticks.replaceChildren(...scale.ticks.flatMap(([value, text]) => [
      drawn("line", { class: "grid", x1: left, x2: right, y1: y(value), y2: y(value) }),
      drawn("text", { x: left - 7, y: y(value) + 4, "text-anchor": "end" }, text)]));
    paths.replaceChildren(...lines.flatMap(({ points, level }, i) => {
      shown[i] = weight ? smoothed(points, weight) : points;
      if (hidden.has(i)) return [];
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
  const readout = element("p", { className: "chart-values" }); // the slider's text is read out, so this is no live region

  function read() {
    const step = steps[Number(reader.value)];
    const values = lines.map(({ name }, i) => {
      const [at, value] = nearest(shown[i], step);
      return { i, at, value, text: `${name} ${value.toPrecision(4)}${at === step ? "" : ` (step ${at})`}`.trim() };
    }).filter(({ i }) => !hidden.has(i));
    cursor.replaceChildren(drawn("line", { x1: x(step), x2: x(step), y1: top, y2: bottom }),
      ...values.map(({ i, at, value }) => drawn("circle", { class: `set-${i % 4}`, cx: x(at), cy: y(value), r: 4 })));
    readout.textContent = `step ${step.toLocaleString("en")}: ${values.map(({ text }) => text).join(", ")}`;
    reader.setAttribute("aria-valuetext", readout.textContent);
  }

  function readAt(step) {
    reader.value = steps.indexOf(nearest(steps.map((one) => [one]), step)[0]);
    read();
  }
  chartReaders.push(readAt);
  const readAllAt = (step) => chartReaders.forEach((readChart) => readChart(step));

  svg.addEventListener("pointermove", (event) => {
    const frame = svg.getBoundingClientRect();
    const at = ((((event.clientX - frame.left) / frame.width) * svg.viewBox.baseVal.width - left) / (right - left)) * last;
    readAllAt(at);
  });
  reader.addEventListener("input", () => readAllAt(steps[Number(reader.value)]));
  const named = lines.flatMap(({ name }, i) => (name ? [i] : []));
  figure.querySelectorAll(".key").forEach((key, place) => {
    const button = element("button", { type: "button", className: "key" }, ...key.childNodes);
    button.setAttribute("aria-pressed", "true");
    button.addEventListener("click", () => {
      const i = named[place];
      if (!hidden.delete(i)) hidden.add(i);
      button.setAttribute("aria-pressed", String(!hidden.has(i)));
      draw();
    });
    if (named.length > 1) key.replaceWith(button);
  });
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

const MOST_PANELS = 8; // Chromium draws 16 in all its tabs of a page
const openPanels = new Map(); // the last ones were in view last
const inView = new Set();
let unpacking = null;
let queue = Promise.resolve();

function bytesOf(name) {
  return Uint8Array.from(atob(document.getElementById(name).content.textContent), (letter) => letter.charCodeAt(0));
}

async function unpackNiivue() {
  const stream = new Blob([bytesOf("niivue")]).stream().pipeThrough(new DecompressionStream("gzip"));
  document.head.append(element("script", { textContent: await new Response(stream).text() })); // its hash is in the policy
}

// Whether a panel may become pictures: nobody sees it, and the keyboard is elsewhere.
function isIdle(box) {
  return !inView.has(box) && !box.contains(document.activeElement);
}

async function openScan(box) {
  if (openPanels.has(box) || !inView.has(box)) return;
  while (openPanels.size >= MOST_PANELS) {
    const idle = [...openPanels.keys()].find(isIdle);
    if (!idle) return; // tried again when another leaves the view
    closeScan(idle);
  }
  const { title, volume, overlay, unit, limit, at, origin } = box.dataset;
  box.querySelector(":scope > .panel-note")?.remove();
  const host = element("div", { className: "panel-host" });
  box.prepend(host);
  try {
    await (unpacking ??= unpackNiivue());
    openPanels.set(box, await openPanel(host, {
      title,
      volume: { bytes: bytesOf(volume).buffer },
      overlay: overlay && { bytes: bytesOf(overlay).buffer, unit, limit: Number(limit) },
      at: at ? at.split(" ").map(Number) : undefined,
      origin,
    }));
    box.classList.add("is-open");
  } catch (error) {
    scans.unobserve(box);
    inView.delete(box);
    host.remove();
    noteOn(box, `Pictures only: ${error.message}`);
  }
}

function noteOn(box, text) {
  box.prepend(element("p", { className: "facts panel-note" }, text));
}

function closeScan(box) {
  const panel = openPanels.get(box);
  openPanels.delete(box);
  panel.close();
  box.querySelector(":scope > .panel-host").remove();
  box.classList.remove("is-open");
}

async function openThoseInView() {
  for (const box of [...inView]) await openScan(box);
}

// What scrolls sideways can be scrolled by keyboard, and what fits is no stop for it.
const scrolling = new ResizeObserver((entries) => entries.forEach(({ target }) => {
  if (target.scrollWidth > target.clientWidth || target.closest(".data")) target.tabIndex = 0;
  else target.removeAttribute("tabindex");
}));

// Texts to copy, such as the methods.
function addCopying(text) {
  const button = element("button", { type: "button", className: "quiet" }, "Copy");
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text.innerText);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(text); // browsers may refuse; what is selected can be copied by keyboard
      button.textContent = "Selected";
    }
  });
  text.after(button);
}

// The navigation marks the section that is read, and scrolls to its name where it is one line that is too long.
function enableNavigation(nav) {
  const links = [...nav.querySelectorAll("a")];
  const headings = links.map((link) => document.getElementById(link.hash.slice(1)));
  const mark = () => {
    const current = headings.findLastIndex((heading) => heading.getBoundingClientRect().top < 0.15 * innerHeight);
    links.forEach((link, i) => (i === current ? link.setAttribute("aria-current", "location") : link.removeAttribute("aria-current")));
    const { offsetLeft: left, offsetWidth: width } = links[Math.max(current, 0)];
    nav.scrollTo({ left: left - (nav.clientWidth - width) / 2, behavior: "instant" });
  };
  const above = "10000000px 0px -85% 0px"; // all that is above the line, so that a long jump does not miss a heading
  const crossing = new IntersectionObserver(mark, { rootMargin: above });
  headings.forEach((heading) => crossing.observe(heading));
}

document.querySelectorAll(".data").forEach(enableTable);
document.querySelectorAll(".scroll, pre").forEach((box) => {
  if (box.closest("details:not([open])")) box.tabIndex = 0; // what is folded is measured when it opens
  scrolling.observe(box);
});
document.querySelectorAll(".curves").forEach(enableChart);
document.querySelectorAll(".chart").forEach(addSaving);
document.querySelectorAll(".to-copy").forEach(addCopying);
document.querySelectorAll("nav").forEach(enableNavigation);
const scans = new IntersectionObserver((entries) => {
  entries.forEach(({ target, isIntersecting }) => {
    if (isIntersecting) inView.add(target);
    else inView.delete(target);
    const panel = openPanels.get(target);
    if (panel) openPanels.delete(target), openPanels.set(target, panel);
  });
  queue = queue.catch(() => {}).then(openThoseInView); // one failure must not keep the others from opening
}, { rootMargin: "300px" });
document.querySelectorAll(".scan[data-volume]").forEach((box) => {
  scans.observe(box);
  box.addEventListener("webglcontextlost", () => {
    if (!openPanels.has(box)) return;
    closeScan(box);
    inView.delete(box); // or it would open again, and lose its note, when another scan comes into view
    noteOn(box, "The browser stopped drawing this scan. Scroll away and back to open it again.");
  }, true);
});
