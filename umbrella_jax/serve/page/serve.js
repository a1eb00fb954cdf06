// The page of `umbrella-jax serve`: what the model is, the scans, and a conversation about them.

import { Answer } from "/static/answers.js";
import { announce, button, byId, element, keepFocus, percent, shortNumber, showError } from "/static/elements.js";
import { getJson, ServerError } from "/static/requests.js";
import { Scans } from "/static/scans.js";

let model = null;
let scans = null;
let messages = []; // of the conversation so far, in OpenAI's form
let shown = new Set(); // ids of the scans in it
let isAsking = false;

// The model

function metricText({ name, value, interval, chance, n }) {
  const isShare = value <= 1 && value >= 0 && /accuracy|auc|recall|precision|f1/i.test(name);
  const say = (number) => (isShare ? `${(100 * number).toFixed(1)} %` : shortNumber(number));
  const parts = [`${name} ${say(value)}`];
  const notes = [];
  if (interval) notes.push(`95 % interval ${interval.map(say).join(" to ")}`);
  if (chance !== null && chance !== undefined) notes.push(`chance ${say(chance)}`);
  if (n) notes.push(`${n} answers`);
  return notes.length ? `${parts[0]} (${notes.join(", ")})` : parts[0];
}

function currentTask() {
  return model?.tasks.find(({ name }) => name === byId("task").value) ?? null;
}

// What is always visible: base, training, and the accuracy of the chosen task, or of all.
function showFacts() {
  const measured = model.tasks.filter(({ metric }) => metric);
  const task = currentTask();
  const brief = ({ name, metric }) => `${name}: ${metric.name} ${/accuracy/i.test(metric.name) ? percent(metric.value) : shortNumber(metric.value)}`;
  const accuracy = task
    ? (task.metric ? `${task.name}: ${metricText(task.metric)}` : `${task.name}: not measured`)
    : measured.slice(0, 3).map(brief).join(" · ") + (measured.length > 3 ? " …" : "") || "not measured";
  const count = (number, noun) => (number ? `${number.toLocaleString("en")} ${noun}` : null);
  const trained = model.trained?.length ? model.trained.join(", ") : "nothing";
  const rows = [
    ["base", model.base ?? "unknown"],
    ["trained", trained],
    ["on", [count(model.subjects, "subjects"), count(model.conversations, "conversations")].filter(Boolean).join(", ") || "unknown data"],
    ["measured", accuracy],
  ];
  byId("facts").replaceChildren(...rows.map(([name, text]) => element("div", {}, element("dt", {}, name), element("dd", {}, text))));
}

function showDetails() {
  const tasks = element("table", {}, element("caption", {}, "Measured on scans that the model was not trained on"),
    element("thead", {}, element("tr", {}, ...["task", "result"].map((name) => element("th", { scope: "col" }, name)))),
    element("tbody", {}, ...model.tasks.map(({ name, metric }) => element("tr", {}, element("th", { scope: "row" }, name),
      element("td", {}, metric ? metricText(metric) : "not measured")))));
  const modalities = element("table", {}, element("caption", {}, "Modalities"),
    element("thead", {}, element("tr", {}, ...["name", "voxels", "patch", "axes to", ""].map((name) => (name ? element("th", { scope: "col" }, name) : element("td"))))),
    element("tbody", {}, ...model.modalities.map(({ name, size, patch, orientation, trained }) => element("tr", {}, element("th", { scope: "row" }, name),
      ...[size.join(" × "), patch.join(" × "), orientation ?? "–", trained === false ? "not trained" : "trained"].map((text) => element("td", {}, text))))));
  byId("model-tables").replaceChildren(...[tasks, modalities].map((table) => element("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": table.caption.textContent }, table)));
  byId("model-details").hidden = false;
}

async function start() {
  try {
    model = await getJson("/api/model");
  } catch (error) {
    showError(byId("model-error"), error, start);
    return;
  }
  byId("model-name").textContent = model.id;
  document.title = `${model.id} · umbrella-jax`;
  byId("notice").textContent = model.notice;
  showFacts();
  showDetails();
  const group = element("optgroup", { label: "tasks of this model" }, ...model.tasks.map(({ name }) => element("option", { value: name }, name)));
  if (model.tasks.length) byId("task").append(group);
  scans = new Scans(model.modalities, showComposer);
  await scans.refresh();
  showComposer();
}

// The question

function showTask() {
  const task = currentTask();
  const wordings = task?.questions ?? [];
  byId("wording-label").hidden = wordings.length < 2;
  byId("wording").replaceChildren(...wordings.map((text, i) => element("option", { value: String(i) }, text)));
  if (wordings.length) byId("question").value = wordings[0];
  byId("compare").hidden = Boolean(task?.answers || task?.numbers);
  showNote();
  showFacts();
}

function showNote() {
  const task = currentTask();
  const isOwn = task?.questions?.length && !task.questions.includes(byId("question").value.trim());
  const parts = [];
  if (task?.answers) parts.push(`Answers: ${task.answers.map((answer) => `“${answer}”`).join(", ")}.`);
  if (task?.numbers) parts.push(`A number from ${task.numbers.low} to ${task.numbers.high} ${task.numbers.unit ?? ""}.`.replace(" .", "."));
  if (isOwn) parts.push("This wording is not the task's own, so its measured accuracy does not apply.");
  byId("task-note").textContent = parts.join(" ");
  byId("task-note").hidden = !parts.length;
}

// Scans of the next question: new ones, which can be left out. Earlier ones stay in the conversation.
function showComposer() {
  const earlier = scans.open.filter(({ facts }) => shown.has(facts.id));
  const fresh = scans.open.filter(({ facts }) => !shown.has(facts.id));
  const boxes = fresh.map((scan) => {
    const box = element("input", { type: "checkbox", checked: scan.isIncluded });
    box.addEventListener("change", () => { scan.isIncluded = box.checked; });
    return element("label", { className: "check" }, box, ` ${scan.label}`, scan.modality ? ` (${scan.modality})` : element("span", { className: "is-warning" }, " (choose its modality)"));
  });
  const questions = [...new Set(fresh.flatMap(({ facts }) => facts.task_questions ?? []))].slice(0, 5);
  const hints = questions.map((text) => button(text, () => {
    byId("task").value = model.tasks.find((task) => task.questions.includes(text))?.name ?? "";
    showTask();
    byId("question").value = text;
    showNote();
    byId("question").focus();
  }));
  const rows = [];
  if (boxes.length) rows.push(element("fieldset", { className: "row" }, element("legend", {}, "Show the model"), ...boxes));
  if (earlier.length) rows.push(element("p", { className: "small" }, `In the conversation already: ${earlier.map(({ label }) => label).join(", ")}.`));
  if (!scans.open.length) rows.push(element("p", { className: "small" }, "No scan is open: the model will answer from the question only."));
  if (hints.length) rows.push(element("div", { className: "row hints" }, element("span", { className: "small" }, "Asked in the data:"), ...hints));
  byId("shown").replaceChildren(...rows);
}

function content(text, used) {
  if (!used.length) return text;
  const images = used.map(({ facts, modality }) => ({ type: "image_url", image_url: { url: `scan:${facts.id}` }, modality }));
  return [...images, { type: "text", text }];
}

function extraFields() {
  const task = currentTask();
  if (task && (task.answers || task.numbers)) return { task: task.name };
  const answers = byId("answers").value.split("\n").map((line) => line.trim()).filter(Boolean);
  return answers.length ? { answers: [...new Set(answers)] } : {};
}

async function ask(event) {
  event?.preventDefault();
  if (isAsking || !model) return;
  const text = byId("question").value.trim();
  const place = byId("ask-error");
  place.replaceChildren();
  if (!text) {
    showError(place, new ServerError("Write a question, or choose a task."));
    byId("question").focus();
    return;
  }
  const used = scans.open.filter(({ facts, isIncluded }) => isIncluded && !shown.has(facts.id));
  const unnamed = used.find(({ modality }) => !modality);
  if (unnamed) {
    unnamed.askForModality();
    return;
  }
  const turn = [...messages, { role: "user", content: content(text, used) }];
  const extra = extraFields();
  const body = { model: model.id, messages: turn };
  if (Object.keys(extra).length) body.umbrella = extra;
  if (byId("longest").value) body.max_tokens = Number(byId("longest").value);
  const hasScans = used.length > 0 || shown.size > 0;
  const answer = new Answer({ question: text, scans: used, body, unit: currentTask()?.numbers?.unit ?? "", hasScans, open: () => scans.open });
  byId("turns").append(answer.item);
  answer.item.scrollIntoView({ block: "end" });
  isAsking = true;
  byId("send").disabled = true;
  try {
    const reply = await answer.run();
    answer.item.scrollIntoView({ block: "nearest" });
    if (reply === null) return;
    messages = [...turn, { role: "assistant", content: reply }];
    used.forEach(({ facts }) => shown.add(facts.id));
    byId("restart").hidden = false;
    byId("question").value = "";
    byId("task").value = "";
    showTask();
  } catch (error) {
    if (error.status === 404) error.remedy = "Or start a new conversation with the scans that are open.";
    showError(answer.error, error, () => {
      answer.item.remove();
      byId("question").value = text;
      ask();
    });
  } finally {
    isAsking = false;
    byId("send").disabled = false;
    keepFocus(byId("question"));
    showComposer();
  }
}

function restart() {
  [messages, shown] = [[], new Set()];
  byId("turns").replaceChildren();
  byId("restart").hidden = true;
  scans.open.forEach((scan) => scan.showMap(null));
  showComposer();
  announce("A new conversation.");
  byId("question").focus();
}

// What sticks below the header, and what is scrolled into view, needs its height.
new ResizeObserver(([entry]) => {
  document.documentElement.style.setProperty("--header", `${entry.borderBoxSize[0].blockSize}px`);
}).observe(document.querySelector("header"));
byId("task").addEventListener("change", showTask);
byId("wording").addEventListener("change", () => {
  byId("question").value = currentTask().questions[Number(byId("wording").value)];
  showNote();
});
byId("question").addEventListener("input", showNote);
byId("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) ask();
});
byId("ask").addEventListener("submit", ask);
byId("restart").addEventListener("click", restart);
start();
