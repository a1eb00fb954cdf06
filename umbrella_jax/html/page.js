// Sorts and filters the tables of a page, and scrolls through its volumes. Everything is legible without it.
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

  function show() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const matching = rows.filter(({ texts, words: text }) => words.every((word) => text.includes(word)) &&
      menus.every(([column, menu]) => menu.value === "" || texts[column] === menu.value));
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

// Volumes: a slider for each axis, in place of the picture of the middle slices and the mosaics.

function enablePlane(mosaic, title) {
  const data = mosaic.dataset;
  const [width, height, across] = [data.width, data.height, data.across].map(Number);
  const numbers = data.numbers.split(" ").map(Number);
  const letters = data.letters.split(" ");
  const [first, last] = data.ends.split(" ");
  const canvas = element("canvas", { width, height });
  canvas.setAttribute("role", "img");
  const slider = element("input", { type: "range", min: 0, max: numbers.length - 1, step: 1 });
  slider.value = Math.floor(numbers.length / 2);
  const position = element("span");

  function draw() {
    const i = Number(slider.value);
    const text = `${data.name} ${numbers[i] + 1} of ${data.length}`;
    canvas.getContext("2d").drawImage(
      mosaic, (i % across) * width, Math.floor(i / across) * height, width, height, 0, 0, width, height);
    canvas.setAttribute("aria-label", `${text}: ${title}`);
    slider.setAttribute("aria-valuetext", text);
    position.textContent = `${text} (${first} to ${last})`;
  }

  slider.addEventListener("input", draw);
  mosaic.decode().then(draw);
  const [left, right, top, bottom] = letters.map((letter) => element("span", {}, letter));
  const corners = [0, 1, 2, 3].map(() => element("span"));
  return element("div", { className: "plane" },
    element("div", { className: "frame" }, corners[0], top, corners[1], left, canvas, right, corners[2], bottom, corners[3]),
    element("label", {}, position, slider));
}

function enableViewer(viewer) {
  const planes = [...viewer.querySelectorAll(".mosaic")].map((mosaic) => enablePlane(mosaic, viewer.dataset.title));
  viewer.querySelector("img").hidden = true;
  viewer.querySelectorAll("details").forEach((details) => { details.hidden = true; });
  viewer.prepend(element("div", { className: "planes" }, ...planes));
}

document.querySelectorAll(".data").forEach(enableTable);
const visible = new IntersectionObserver((entries) => entries.filter((entry) => entry.isIntersecting).forEach((entry) => {
  visible.unobserve(entry.target);
  enableViewer(entry.target); // only now, because decoded images take much memory
}), { rootMargin: "600px" });
document.querySelectorAll(".viewer").forEach((viewer) => visible.observe(viewer));
