// The distribution of a numeric answer: bars, what the answer would be without the scan, medians and intervals.

import { element, percent, shortNumber, svg } from "/static/elements.js";

const MOST_BARS = 40;
const [WIDTH, LEFT, RIGHT, TOP, HEIGHT] = [360, 46, 10, 8, 130]; // of the bars, in pixels of a phone; HEIGHT without axis
const ROW = 12; // of a line with a median and an interval

// Multiples of 1, 2 or 5 times a power of ten between two numbers, about five; as axes.py has them for other pages.
function roundNumbers(low, high) {
  const span = high - low || Math.abs(high) || 1;
  const power = 10 ** Math.floor(Math.log10(span / 4));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => 5 * size >= span);
  const [first, last] = [Math.ceil(low / step - 1e-9), Math.floor(high / step + 1e-9)];
  return { step, ticks: Array.from({ length: Math.max(last - first + 1, 0) }, (_, i) => Number(((first + i) * step).toPrecision(12))) };
}

// Sum neighbours, so that a grid of hundreds of candidates has bars that can be seen.
function binned({ values, probabilities }) {
  const count = Math.ceil(values.length / MOST_BARS);
  const bins = [];
  for (let i = 0; i < values.length; i += count) {
    const last = Math.min(i + count, values.length) - 1;
    bins.push({ from: values[i], to: values[last], share: probabilities.slice(i, last + 1).reduce((a, b) => a + b, 0) });
  }
  return { count, bins };
}

// The widest interval of a distribution.
function intervalOf(numbers) {
  const key = Object.keys(numbers).filter((name) => /^interval_/.test(name)).sort().at(-1);
  return key ? { level: key.slice("interval_".length), ends: numbers[key] } : null;
}

function summaryOf(numbers, unit) {
  const interval = intervalOf(numbers);
  return [
    `Expected ${shortNumber(numbers.expectation)} ${unit}`.trim(), `median ${shortNumber(numbers.median)}`,
    interval ? `${interval.level} % between ${interval.ends.map(shortNumber).join(" and ")}` : null,
  ].filter(Boolean).join(" · ");
}

// A figure of `numbers`, the field of an answer, and of `blank`, the same without the scan, if there is one.
export function numberFigure(numbers, unit, blank) {
  const { values } = numbers;
  const { count, bins } = binned(numbers);
  const others = blank ? binned(blank).bins : [];
  const step = values.length > 1 ? (values.at(-1) - values[0]) / (values.length - 1) : 1;
  const [low, high] = [values[0] - step / 2, values.at(-1) + step / 2];
  const x = (value) => LEFT + ((value - low) / (high - low)) * (WIDTH - LEFT - RIGHT);

  const highest = Math.max(...[...bins, ...others].map(({ share }) => share), 1e-9);
  const marks = roundNumbers(0, highest);
  const shares = marks.ticks.at(-1) >= highest * (1 - 1e-9) ? marks.ticks : [...marks.ticks, marks.ticks.length * marks.step];
  const bottom = TOP + HEIGHT;
  const y = (share) => bottom - (share / shares.at(-1)) * HEIGHT;
  const decimals = Math.max(0, -Math.floor(Math.log10(100 * marks.step) + 1e-9));
  const parts = shares.flatMap((share) => [
    svg("line", { x1: LEFT, x2: WIDTH - RIGHT, y1: y(share), y2: y(share), class: "grid" }),
    svg("text", { x: LEFT - 6, y: y(share) + 4, "text-anchor": "end", class: "share-tick" }, `${(100 * share).toFixed(decimals)} %`),
  ]);

  for (const { from, to, share } of bins) {
    const name = from === to ? shortNumber(from) : `${shortNumber(from)} to ${shortNumber(to)}`;
    const [left, right] = [x(from - step / 2), x(to + step / 2)];
    parts.push(svg("rect", { x: left + 0.5, y: y(share), width: Math.max(right - left - 1, 1), height: bottom - y(share), class: "with" },
      svg("title", {}, `${name} ${unit}: ${percent(share)}`)));
  }
  if (blank) { // an outline of bars, since a line would show numbers between them
    const corners = others.flatMap(({ from, to, share }) => [[from - step / 2, share], [to + step / 2, share]]);
    const path = corners.map(([value, share]) => `${x(value).toFixed(2)},${y(share).toFixed(2)}`).join(" ");
    parts.push(svg("polyline", { points: `${LEFT},${bottom} ${path} ${WIDTH - RIGHT},${bottom}`, class: "without-line" }));
  }

  const rows = [["with", numbers], ...(blank ? [["without", blank]] : [])];
  rows.forEach(([kind, own], i) => {
    const [interval, at] = [intervalOf(own), bottom + ROW * (i + 0.75)];
    if (interval) parts.push(svg("line", { x1: x(interval.ends[0]), x2: x(interval.ends[1]), y1: at, y2: at, class: `interval-line ${kind}` }));
    parts.push(svg("circle", { cx: x(own.median), cy: at, r: 4, class: `median ${kind}` }));
  });
  const axis = bottom + ROW * (rows.length + 0.5);
  parts.push(svg("line", { x1: LEFT, x2: WIDTH - RIGHT, y1: axis, y2: axis }));
  for (const tick of roundNumbers(low, high).ticks) {
    parts.push(svg("line", { x1: x(tick), x2: x(tick), y1: axis, y2: axis + 4 }),
      svg("text", { x: x(tick), y: axis + 17, "text-anchor": "middle", class: "tick" }, shortNumber(tick)));
  }
  if (unit) parts.push(svg("text", { x: (LEFT + WIDTH - RIGHT) / 2, y: axis + 33, "text-anchor": "middle" }, unit));

  const [own, other] = [summaryOf(numbers, unit), blank && `Without the scan: ${summaryOf(blank, unit).replace(/^E/, "e")}`];
  const bars = count === 1 ? "Bars: probability of each number." : `Bars: probability of ${count} numbers each.`;
  const said = `${bars} Line and dot below: ${intervalOf(numbers)?.level ?? ""} % interval and median.`;
  const line = (kind, text) => element("p", {}, blank ? element("span", { className: `swatch ${kind}` }) : null, blank ? " " : null, element("b", {}, text));
  return element("figure", { className: "chart numbers" },
    element("figcaption", {}, line("with", own), other ? line("without", other) : null, element("p", {}, said)),
    svg("svg", { viewBox: `0 0 ${WIDTH} ${axis + (unit ? 40 : 24)}`, role: "img", "aria-label": ["Probability of each number", own, other].filter(Boolean).join(". ") }, ...parts));
}
