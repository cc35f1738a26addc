// Pieces of the page: elements, tokens of a text, bars of a distribution, a heat map, a loss curve.

import { hold, release } from "./api.js";

export function el(tag, attributes = {}, ...children) {
  const svg = ["svg", "polyline", "line", "circle", "text", "title"].includes(tag);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

export function percent(logprob) {
  const value = logprob === null ? 0 : 100 * Math.exp(logprob);
  if (value < 0.01) return logprob === null ? "never" : "< 0.01 %";
  return `${value.toFixed(value < 1 ? 2 : 1)} %`;
}
export const nats = (value) => (value === null || value === undefined ? "unknown" : value.toFixed(3));

let special = {}; // ids of the tokens that stand for no text

export function setSpecial(tokens) {
  special = tokens;
}

// A token as it can be read where it stands alone.
export function shown(token) {
  if (!token.bytes.length) return token.id === special.bos ? "⟨start⟩" : token.id === special.eos ? "⟨end⟩" : "⟨special⟩";
  const text = token.text.replaceAll("\n", "⏎").replaceAll("\t", "⇥");
  if (/^ +$/.test(text)) return "␣".repeat(text.length);
  return text.includes("\ufffd") ? token.bytes.map((byte) => `⟨${byte.toString(16).padStart(2, "0")}⟩`).join("") : text;
}

// Tokens as text that can be walked through: one stop for Tab, arrows from token to token. `look(index)` is called for
// the token under the pointer or the focus, `pick(index)` for a click or Enter.
export class TokenText {
  constructor(label, { look = () => {}, pick = null } = {}) {
    this.tokens = [];
    this.decoder = new TextDecoder();
    this.box = el("div", { class: "tokens", role: "group", "aria-label": label });
    const index = (event) => Number(event.target.closest("[data-index]")?.dataset.index ?? -1);
    for (const kind of ["mouseover", "focusin"]) {
      this.box.addEventListener(kind, (event) => index(event) >= 0 && look(index(event)));
    }
    this.box.addEventListener("click", (event) => {
      if (index(event) < 0) return;
      this.focus(index(event));
      pick?.(index(event));
    });
    this.box.addEventListener("keydown", (event) => {
      const now = index(event);
      const last = this.tokens.length - 1;
      const to = { ArrowLeft: now - 1, ArrowRight: now + 1, Home: 0, End: last }[event.key];
      if (to !== undefined) this.focus(Math.min(Math.max(to, 0), last));
      else if (event.key === "Enter" || event.key === " ") pick?.(now);
      else return;
      event.preventDefault();
    });
  }

  // Each token has `text`, `bytes`, and perhaps `logprob` (its surprise colours it) or `weight` (0 to 1).
  add(tokens, plainCount = 0) {
    for (const token of tokens) {
      const index = this.tokens.length;
      this.tokens.push(token);
      const text = token.bytes.length ? this.decoder.decode(Uint8Array.from(token.bytes), { stream: true }) : "";
      const surprise = token.logprob === null || token.logprob === undefined ? null : -token.logprob;
      const told = surprise === null ? "" : `, ${percent(token.logprob)}, ${surprise.toFixed(2)} nats`;
      const span = el(
        "span",
        {
          class: index < plainCount ? "token of-prompt" : "token",
          role: "button",
          tabindex: index ? -1 : 0,
          "data-index": index,
          "aria-label": `${shown(token)}${told}`,
        },
        text || (token.bytes.length ? "·" : "▪"),
      );
      if (surprise !== null) span.style.setProperty("--heat", Math.min(1, surprise / 6));
      this.box.append(span);
    }
  }

  // Colours each token by a weight from 0 to 1 instead.
  weigh(weights) {
    [...this.box.children].forEach((span, index) => {
      span.classList.toggle("weighed", index < weights.length);
      span.style.setProperty("--weight", weights[index] ?? 0);
    });
  }

  mark(index) {
    [...this.box.children].forEach((span, other) => span.classList.toggle("marked", other === index));
  }

  focus(index) {
    [...this.box.children].forEach((span, other) => (span.tabIndex = other === index ? 0 : -1));
    this.box.children[index]?.focus();
  }

  get text() {
    return textOf(this.tokens);
  }
}

export function textOf(tokens) {
  return new TextDecoder().decode(Uint8Array.from(tokens.flatMap((token) => token.bytes)));
}

// The likeliest tokens with their probability before (frame) and after (filled) temperature and filters.
export function distribution(top, { chosen = null, pick = null, verb = "go on with" } = {}) {
  const list = el("ol", { class: "bars" });
  const highest = Math.max(...top.map((token) => Math.exp(Math.max(token.logprob, token.logprob_after ?? -99))), 1e-9);
  for (const token of top) {
    const [before, after] = [Math.exp(token.logprob), token.logprob_after === null ? 0 : Math.exp(token.logprob_after)];
    const bar = el("span", { class: "bar", "aria-hidden": "true" }, el("i", { class: "before" }), el("i", { class: "after" }));
    bar.children[0].style.width = `${(100 * before) / highest}%`;
    bar.children[1].style.width = `${(100 * after) / highest}%`;
    const numbers = el("span", { class: "numbers" }, `${(100 * before).toFixed(1)} → ${(100 * after).toFixed(1)} %`);
    const label = `${verb} ${shown(token)}: ${percent(token.logprob)} before, ${percent(token.logprob_after)} after`;
    const content = [el("span", { class: "word" }, shown(token)), bar, numbers];
    const isChosen = token.id === chosen;
    const row = pick
      ? el("button", { type: "button", "aria-label": label, "data-token": token.id, onclick: () => pick(token) }, ...content)
      : el("span", { class: "plain", "aria-label": label, role: "img" }, ...content);
    list.append(el("li", { class: isChosen ? "chosen" : null, "aria-current": isChosen ? "true" : null }, row));
  }
  return list;
}

// Attention weights, queries from top to bottom, keys from left to right.
export function heatMap(weights, label) {
  const named = label ? { role: "img", "aria-label": label } : { "aria-hidden": "true" }; // beside a text that names it
  const canvas = el("canvas", { ...named, width: weights.length, height: weights.length });
  const [r, g, b] = getComputedStyle(document.documentElement).getPropertyValue("--weight-rgb").split(",").map(Number);
  const image = new ImageData(weights.length, weights.length);
  weights.forEach((row, query) =>
    row.forEach((weight, key) => image.data.set([r, g, b, 255 * Math.sqrt(weight)], 4 * (query * weights.length + key))),
  );
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

// Losses over steps, with a mark at one step; `pick(step)` is called with the step under a click.
export function lossCurve(losses, step, pick) {
  const [width, height, left, bottom] = [640, 220, 46, 24];
  const { train, valid, floor_nats_per_token: floor } = losses;
  const points = [train, valid].flatMap(({ steps, nats_per_token: values }) => steps.map((s, i) => [s, values[i]]));
  const known = points.filter(([, value]) => value !== null);
  if (!known.length) return el("p", {}, "This workdir has no record of its training.");
  const lastStep = Math.max(...known.map(([s]) => s));
  const values = known.map(([, value]) => value);
  const low = Math.min(...values, floor ?? Infinity);
  const high = Math.max(...values);
  const x = (s) => left + ((width - left - 8) * s) / lastStep;
  const y = (value) => 8 + ((height - bottom - 8) * (high - value)) / (high - low || 1);
  const line = ({ steps, nats_per_token: v }, kind) => {
    const pairs = steps.flatMap((s, i) => (v[i] === null ? [] : [`${x(s).toFixed(1)},${y(v[i]).toFixed(1)}`]));
    return el("polyline", { points: pairs.join(" "), class: kind });
  };
  const label = `loss in nats per token over ${lastStep} steps, from ${nats(values[0])} to ${nats(values.at(-1))}`;
  const svg = el("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label, class: "curve" });
  for (const value of [low, (low + high) / 2, high]) {
    svg.append(el("line", { x1: left, x2: width, y1: y(value), y2: y(value), class: "grid" }));
    svg.append(el("text", { x: left - 4, y: y(value) + 4, "text-anchor": "end" }, value.toFixed(2)));
  }
  for (const part of [0, 0.5, 1]) {
    const at = Math.round(part * lastStep);
    svg.append(el("text", { x: x(at), y: height - 6, "text-anchor": part === 1 ? "end" : "middle" }, at.toLocaleString()));
  }
  if (floor) svg.append(el("line", { x1: left, x2: width, y1: y(floor), y2: y(floor), class: "floor" }));
  svg.append(line(train, "train"), line(valid, "valid"));
  valid.steps.forEach((s, i) => valid.nats_per_token[i] !== null &&
    svg.append(el("circle", { cx: x(s), cy: y(valid.nats_per_token[i]), r: 3, class: "valid" })));
  svg.append(el("line", { x1: x(step), x2: x(step), y1: 8, y2: height - bottom, class: "here" }));
  svg.addEventListener("click", (event) => {
    const box = svg.getBoundingClientRect();
    pick((((event.clientX - box.left) / box.width) * width - left) / ((width - left - 8) / lastStep));
  });
  return svg;
}

export function slider(name, label, { min, max, step, value, change }) {
  const out = el("output", { for: `s-${name}` }, String(value));
  const input = el("input", {
    type: "range", id: `s-${name}`, min, max, step, value,
    oninput: () => { out.textContent = input.value; change(Number(input.value)); },
  });
  return el("div", { class: "slider" }, el("label", { for: `s-${name}` }, label), out, input);
}

// The last of many calls, a moment after it.
export function debounced(act, ms = 120) {
  let timer = null;
  return (...values) => {
    if (timer === null) hold();
    clearTimeout(timer);
    timer = setTimeout(() => {
      timer = null;
      try {
        act(...values);
      } finally {
        release();
      }
    }, ms);
  };
}
