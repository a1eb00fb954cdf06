// The page of `umbrella-jax serve`: what the model is, the scans, and a conversation about them.

import { Answer } from "/static/answers.js";
import { announce, button, byId, element, keepFocus, percent, shortNumber, showError } from "/static/elements.js";
import { getJson, ServerError } from "/static/requests.js";
import { Scans } from "/static/scans.js";

const MOST_HINTS = 5; // questions of the data that are offered at a time
let model = null;
let scans = null;
let conversation = newConversation();

// `messages` are in OpenAI's form; `scans` is {id: scan} of those in it. `stopper` ends all requests about it.
function newConversation() {
  return { messages: [], scans: new Map(), answers: [], isAsking: false, stopper: new AbortController() };
}

// The model

function metricText({ name, value, interval, chance, n, unit }) {
  const isShare = value <= 1 && value >= 0 && /accuracy|auc|recall|precision|f1/i.test(name);
  const say = (number) => (isShare ? `${(100 * number).toFixed(1)} %` : shortNumber(number));
  const result = `${name} ${say(value)} ${unit}`.trim();
  const notes = [];
  if (interval) notes.push(`95 % interval ${interval.map(say).join(" to ")}`);
  if (chance !== null && chance !== undefined) notes.push(`chance ${say(chance)}`);
  if (n) notes.push(`${n} answers`);
  return notes.length ? `${result} (${notes.join(", ")})` : result;
}

function currentTask() {
  return model?.tasks.find(({ name }) => name === byId("task").value) ?? null;
}

// What is always visible: base, training, and the accuracy of the chosen task, or of all.
function showFacts() {
  const measured = model.tasks.filter(({ metric }) => metric);
  const task = currentTask();
  const brief = ({ name, metric }) => `${name}: ${metric.name} ${/accuracy/i.test(metric.name) ? percent(metric.value) : `${shortNumber(metric.value)} ${metric.unit}`.trim()}`;
  const accuracy = task
    ? (task.metric ? `${task.name}: ${metricText(task.metric)}` : `${task.name}: not measured`)
    : measured.slice(0, 3).map(brief).join(" · ") + (measured.length > 3 ? " …" : "") || "not measured";
  const count = (number, noun) => (number ? `${number.toLocaleString("en")} ${noun}` : null);
  const trained = model.trained === null ? "unknown" : model.trained.join(", ") || "nothing";
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
  byId("notice").textContent = model.notice;
  byId("version").textContent = [model.step, `umbrella-jax ${model.version}`].filter(Boolean).join(" · ");
  byId("model-details").hidden = false;
  const gaps = model.gaps.map(({ effect, reason }) => element("li", {}, element("strong", {}, effect), `: ${reason}`));
  byId("gap-list").replaceChildren(...gaps);
  byId("gaps").hidden = !gaps.length;
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
  showFacts();
  showDetails();
  const group = element("optgroup", { label: "tasks of this model" }, ...model.tasks.map(({ name }) => element("option", { value: name }, name)));
  if (model.tasks.length) byId("task").append(group);
  scans = new Scans(model.modalities, () => {
    showComposer();
    conversation.answers.forEach((answer) => answer.update());
  });
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

// Why the measured accuracy of a task may not apply to the question as it is; null if nothing speaks against it.
function whyNotMeasured(task) {
  const { questions, more_questions: more, turns, scans: expected } = task;
  if (questions.length && !questions.includes(byId("question").value.trim())) {
    return more ? `This is none of the task's ${questions.length} most frequent wordings` : "This wording is not the task's own";
  }
  if (turns === null) return null;
  const said = conversation.messages.filter(({ role }) => role === "user").length;
  if (said + 1 !== turns) {
    return turns === 1 ? "The data asks it at the start of a conversation" : `The data asks it as question ${turns} of a conversation`;
  }
  const count = conversation.scans.size + freshScans().filter(({ isIncluded }) => isIncluded).length;
  return count === expected ? null : `The data shows ${expected} ${expected === 1 ? "scan" : "scans"} with it, not ${count}`;
}

function showNote() {
  const task = currentTask();
  const parts = [];
  if (task?.answers) parts.push(`Answers: ${task.answers.map((answer) => `“${answer}”`).join(", ")}.`);
  if (task?.numbers) parts.push(`A number from ${task.numbers.low} to ${task.numbers.high} ${task.numbers.unit ?? ""}.`.replace(" .", "."));
  const why = task?.metric && whyNotMeasured(task);
  if (why) parts.push(`${why}, so the measured accuracy does not apply.`);
  byId("task-note").textContent = parts.join(" ");
  byId("task-note").hidden = !parts.length;
}

// Open scans that the next question can show: those that are not in the conversation yet.
function freshScans() {
  return scans.open.filter(({ facts, isGone }) => !isGone && !conversation.scans.has(facts.id));
}

// Scans of the next question: new ones, which can be left out. Earlier ones stay in the conversation.
function showComposer() {
  const fresh = freshScans();
  const boxes = fresh.map((scan) => {
    const box = element("input", { type: "checkbox", checked: scan.isIncluded });
    box.addEventListener("change", () => {
      scan.isIncluded = box.checked;
      showNote();
    });
    return element("label", { className: "check" }, box, ` ${scan.label}`, scan.modality ? ` (${scan.modality})` : element("span", { className: "is-warning" }, " (choose its modality)"));
  });
  const questions = [...new Set(fresh.flatMap(({ facts }) => facts.task_questions ?? []))];
  const hints = questions.slice(0, MOST_HINTS).map((text) => button(text, () => {
    byId("task").value = model.tasks.find((task) => task.questions.includes(text))?.name ?? "";
    showTask();
    byId("question").value = text;
    showNote();
    byId("question").focus();
  }));
  if (questions.length > hints.length) hints.push(element("span", { className: "small" }, `and ${questions.length - hints.length} more`));
  const earlier = [...conversation.scans.values()].map((scan) => {
    const state = scan.isGone ? " (gone)" : scan.isClosed ? " (closed)" : "";
    return `${scan.label}${state}`;
  });
  const rows = [];
  if (boxes.length) rows.push(element("fieldset", { className: "row" }, element("legend", {}, "Show the model"), ...boxes));
  if (earlier.length) rows.push(element("p", { className: "small" }, `In the conversation already: ${earlier.join(", ")}.`));
  if ([...conversation.scans.values()].some(({ isGone }) => isGone)) {
    rows.push(element("p", { className: "is-warning" }, "The server no longer has one of its scans: start a new conversation."));
  }
  if (!fresh.length && !earlier.length) rows.push(element("p", { className: "small" }, "No scan to show: the model will answer from the question only."));
  if (hints.length) rows.push(element("div", { className: "row hints" }, element("span", { className: "small" }, "Asked in the data:"), ...hints));
  byId("shown").replaceChildren(...rows);
  showNote();
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
  const own = conversation; // a new one may begin before the answer is there
  if (own.isAsking || !model || !scans) return;
  const text = byId("question").value.trim();
  const place = byId("ask-error");
  place.replaceChildren();
  if (!text) {
    showError(place, new ServerError("Write a question, or choose a task."));
    byId("question").focus();
    return;
  }
  const used = freshScans().filter(({ isIncluded }) => isIncluded);
  const unnamed = used.find(({ modality }) => !modality);
  if (unnamed) {
    unnamed.askForModality();
    return;
  }
  const turn = [...own.messages, { role: "user", content: content(text, used) }];
  const extra = extraFields();
  const body = { model: model.id, messages: turn };
  if (Object.keys(extra).length) body.umbrella = extra;
  if (byId("longest").value) body.max_tokens = Number(byId("longest").value);
  const hasScans = used.length > 0 || own.scans.size > 0;
  const named = used.map(({ label, modality, facts }) => ({ label, modality, facts })); // as they are now
  const unit = currentTask()?.numbers?.unit ?? "";
  const answer = new Answer({ question: text, scans: named, body, unit, hasScans, open: () => scans.open, ended: own.stopper.signal });
  byId("turns").append(answer.item);
  byId("talk-actions").hidden = false;
  answer.item.scrollIntoView({ block: "end" });
  own.isAsking = true;
  byId("send").disabled = true;
  try {
    const reply = await answer.run();
    if (own !== conversation) return;
    answer.item.scrollIntoView({ block: "nearest" });
    if (reply === null) return;
    own.messages = [...turn, { role: "assistant", content: reply }];
    own.answers.push(answer);
    used.forEach((scan) => own.scans.set(scan.facts.id, scan));
    own.last = { task: byId("task").value, text };
    byId("question").value = "";
    byId("task").value = "";
    showTask();
  } catch (error) {
    if (own === conversation) await showAskError(error, answer, text);
  } finally {
    own.isAsking = false;
    if (own === conversation) {
      byId("send").disabled = false;
      keepFocus(byId("question"));
      showComposer();
    }
  }
}

async function showAskError(error, answer, text) {
  const again = () => {
    answer.item.remove();
    byId("question").value = text;
    ask();
  };
  if (error.code === "model_not_found") error.remedy = "The server was started again with another model: reload this page.";
  // without the scan, the same question would mean something else
  showError(answer.error, error, ["no_such_scan", "model_not_found"].includes(error.code) ? null : again);
  answer.item.scrollIntoView({ block: "nearest" });
  if (error.code === "no_such_scan") await scans.refresh();
}

// Start again with the scans that are open, and offer the last question for them.
function restart() {
  const { last, stopper } = conversation;
  stopper.abort();
  conversation = newConversation();
  byId("turns").replaceChildren();
  byId("talk-actions").hidden = true;
  byId("send").disabled = false;
  scans.open.forEach((scan) => scan.showMap(null));
  if (last && !byId("question").value) {
    byId("task").value = last.task;
    showTask();
    byId("question").value = last.text;
  }
  showComposer();
  announce("A new conversation.");
  byId("question").focus();
}

function save() {
  const { id, base, step, version } = model;
  const saved = { model: { id, base, step, umbrella_jax: version }, saved: new Date().toISOString(), answers: conversation.answers.map((answer) => answer.toJson()) };
  const url = URL.createObjectURL(new Blob([JSON.stringify(saved, null, 2)], { type: "application/json" }));
  element("a", { href: url, download: `conversation_${id.replace(/\W+/g, "_")}.json` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
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
byId("save").addEventListener("click", save);
start();
