// Elements of the page. Texts are always text nodes, so nothing that a file or a model says becomes markup.

const SVG = "http://www.w3.org/2000/svg";

// Make an element. Properties that it does not have become attributes; children that are null are left out.
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

export function svg(tag, attributes = {}, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

export function button(text, click, properties = {}) {
  const made = element("button", { type: "button", ...properties }, text);
  made.addEventListener("click", click);
  return made;
}

export function byId(id) {
  return document.getElementById(id);
}

// Tell users of screen readers what happened elsewhere on the page.
export function announce(text) {
  byId("announcer").textContent = text;
}

// Give the focus to an element if the one that had it is gone, hidden or disabled.
export function keepFocus(place) {
  const { activeElement: active, body } = document;
  if (active === body || active.disabled || !active.checkVisibility()) place.focus({ preventScroll: true });
}

// Show an error where it happened, with a button that tries again if `retry` is given.
export function showError(place, error, retry = null) {
  const again = retry && button("Try again", () => {
    place.replaceChildren();
    retry();
  });
  place.replaceChildren(element("div", { className: "alert" },
    element("p", {}, error.message), error.remedy ? element("p", {}, error.remedy) : null, again));
}

export function percent(share) {
  if (share > 0 && share < 0.001) return "< 0.1 %";
  if (share < 1 && share > 0.999) return "> 99.9 %";
  return `${(100 * share).toFixed(1)} %`;
}

export function shortNumber(value) {
  return Number.isFinite(value) ? String(Number(value.toPrecision(4))) : "–";
}
