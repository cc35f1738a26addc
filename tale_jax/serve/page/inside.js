// Inside: attention, the logit lens, and what heads and layers are for, all by the model's own forward pass.

import { post } from "./api.js";
import { ablation, sampling, set, state, weights } from "./state.js";
import { TokenText, debounced, el, heatMap, nats, percent, shown } from "./view.js";

// What is looked into: what was typed here, or the text that was written, or the prompt.
export function lookedAt(page) {
  if (state.text) return state.text;
  const ids = page.tree.nodes[state.node]?.tokens.filter((token) => token.bytes.length).map((token) => token.id) ?? [];
  return ids.length ? ids.slice(0, page.about.context - 1) : state.prompt;
}

// The position that is looked at: one that was chosen, or the last.
function position(tokens) {
  return state.at >= 0 && state.at < tokens.length ? state.at : tokens.length - 1;
}

export async function render(panel, page) {
  const box = el("textarea", { rows: 3, id: "inside-text", spellcheck: "false" });
  const plain = state.text || page.tree.nodes[state.node]?.tokens.map((t) => t.text).join("") || state.prompt;
  box.value = plain;
  box.addEventListener("input", debounced(() => { set({ text: box.value, at: -1 }); look(); }, 400));
  const sum = el("p", { class: "facts" });
  const [attention, lens] = [el("section"), el("section")];
  panel.replaceChildren(el("label", { for: "inside-text" }, "Text to look into"), box, sum, attention, lens, ablations(page));

  async function look() {
    try {
      const prompt = lookedAt(page);
      const seen = await post("/inspect/tokens", { ...weights(), ...sampling(), prompt, top: 1 });
      sum.textContent = `${seen.tokens.length} tokens with the start mark, ${nats(seen.nats)} nats in all`;
      const drawLens = await lensOf(lens, prompt);
      await attentionOf(attention, page, prompt, () => drawLens());
    } catch (error) {
      page.fail(error);
    }
  }
  await look();
}

// The heads of a layer, and what the token that is looked at looks at.
async function attentionOf(section, page, prompt, moved) {
  const { layers, heads } = page.about;
  set({ layer: Math.min(state.layer, layers - 1), head: Math.min(state.head, heads - 1) });
  const choose = el("select", { id: "layer", onchange: () => { set({ layer: Number(choose.value) }); redraw(); } },
    ...Array.from({ length: layers }, (_, i) => el("option", { value: i }, `layer ${i}`)));
  choose.value = state.layer;
  const thumbs = el("div", { class: "thumbs", role: "group", "aria-label": "Heads" });
  const words = el("p", { "aria-live": "polite" });
  const map = el("div", { class: "map" });
  let seen = null;
  const text = new TokenText("Text: choose the token whose attention is shown", { look: (at) => move(at) });
  section.replaceChildren(el("h2", {}, "Attention"), el("div", { class: "row" },
    el("label", {}, "Layer ", choose), thumbs), text.box, words, map);

  function move(at) {
    set({ at });
    show();
    moved();
  }

  function show() {
    const rows = seen.heads[state.head].weights;
    const at = position(seen.tokens);
    const row = rows[at];
    text.weigh(row);
    text.mark(at);
    const order = row.map((weight, key) => [weight, key]).sort((a, b) => b[0] - a[0]).slice(0, 5);
    const parts = order.map(([weight, key]) => `“${shown(seen.tokens[key])}” (${key}) ${(100 * weight).toFixed(0)} %`);
    words.textContent = `“${shown(seen.tokens[at])}” (${at}) looks at ${parts.join(", ")}.`;
  }

  async function redraw() {
    try {
      seen = await post("/inspect/attention", { ...weights(), prompt, layer: state.layer });
    } catch (error) {
      return page.fail(error);
    }
    if (!text.tokens.length) text.add(seen.tokens);
    thumbs.replaceChildren(...seen.heads.map(({ head, weights: rows }) => {
      const pick = () => { set({ head }); big(); show(); };
      const attributes = { type: "button", class: "thumb", "data-head": head, onclick: pick };
      return el("button", attributes, heatMap(rows, ""), `head ${head}`);
    }));
    big();
    show();
    return null;
  }

  function big() {
    const rows = seen.heads[state.head].weights;
    const label = `Attention of layer ${state.layer}, head ${state.head}: queries from top to bottom, keys from left to right`;
    map.replaceChildren(heatMap(rows, label));
    [...thumbs.children].forEach((thumb, head) => thumb.setAttribute("aria-pressed", String(head === state.head)));
  }

  await redraw();
  moved();
}

// What the model would say next if it ended after each layer. Gives what draws the position that is looked at.
async function lensOf(section, prompt) {
  const seen = await post("/inspect/lens", { ...weights(), prompt, top: 5 });
  const own = el("div", { class: "scroller", tabindex: 0, role: "region", "aria-label": "Layers of one position" });
  const head = el("h3");
  const body = seen.layers.map(({ layer, positions }) => el("tr", {},
    el("th", { scope: "row" }, layer ? `after layer ${layer - 1}` : "embedding"),
    ...positions.map(({ top }, at) => {
      const cell = el("td", { "data-at": at, title: `${shown(top[0])}: ${percent(top[0].logprob)}` }, shown(top[0]));
      cell.style.setProperty("--weight", Math.exp(top[0].logprob));
      return cell;
    })));
  const names = el("tr", {}, el("th", { scope: "col" }, "token"),
    ...seen.tokens.map((token) => el("th", { scope: "col" }, shown(token))));
  const all = el("div", { class: "scroller", tabindex: 0, role: "region", "aria-label": "Logit lens of the whole text" },
    el("table", { class: "lens" }, el("thead", {}, names), el("tbody", {}, ...body.reverse())));
  section.replaceChildren(el("h2", {}, "Logit lens"),
    el("p", { class: "hint" }, "The final norm and the head, applied after each layer: what would be said next."),
    all, head, own);

  return function draw() {
    const at = position(seen.tokens);
    const next = seen.tokens[at + 1];
    head.textContent = `After “${shown(seen.tokens[at])}” (${at})${next ? `, where “${shown(next)}” follows` : ""}`;
    for (const cell of all.querySelectorAll("td")) cell.classList.toggle("marked", Number(cell.dataset.at) === at);
    const rows = seen.layers.map(({ layer, positions }) => el("tr", {},
      el("th", { scope: "row" }, layer ? `after layer ${layer - 1}` : "embedding"),
      el("td", {}, next ? percent(positions[at].logprob) : "–"),
      ...positions[at].top.map((token) => el("td", {}, `${shown(token)} ${percent(token.logprob)}`))));
    own.replaceChildren(el("table", { class: "layers" }, el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "layer"),
      el("th", { scope: "col" }, "what follows"), el("th", { scope: "col", colspan: 5 }, "likeliest"))),
    el("tbody", {}, ...rows.reverse())));
  };
}

// Heads and layers to leave out, and the text with and without them.
function ablations(page) {
  const { layers, heads } = page.about;
  const result = el("div", { class: "cards" });
  const chosen = ablation();
  const boxes = [];
  const check = (label, checked, value) => {
    const input = el("input", { type: "checkbox", "aria-label": label, checked });
    boxes.push([input, value]);
    return el("td", {}, input);
  };
  const rows = Array.from({ length: layers }, (_, layer) => el("tr", {}, el("th", { scope: "row" }, `layer ${layer}`),
    ...Array.from({ length: heads }, (_, head) => check(`ablate head ${head} of layer ${layer}`,
      chosen.heads.some(([l, h]) => l === layer && h === head), [layer, head])),
    check(`ablate layer ${layer}`, chosen.layers.includes(layer), layer)));
  const names = [...Array.from({ length: heads }, (_, head) => `head ${head}`), "whole layer"];
  const table = el("table", { class: "ablate" }, el("thead", {}, el("tr", {}, el("td"),
    ...names.map((name) => el("th", { scope: "col" }, name)))), el("tbody", {}, ...rows));

  async function write() {
    const on = boxes.filter(([input]) => input.checked).map(([, value]) => value);
    const [pairs, whole] = [on.filter(Array.isArray), on.filter((value) => !Array.isArray(value))];
    set({ ablate_heads: pairs.map((pair) => pair.join(".")).join("_"), ablate_layers: whole.join("_") });
    const ablate = { heads: pairs, layers: whole };
    const base = { ...weights(), ...sampling(), prompt: state.prompt, seed: state.seed, max_tokens: state.max_tokens,
      logprobs: 0, token_details: true };
    const text = { ...weights(), prompt: lookedAt(page), top: 0 };
    result.replaceChildren("writing…");
    try {
      const [one, other, before, after] = await Promise.all([post("/v1/completions", base),
        post("/v1/completions", { ...base, ablate }), post("/inspect/tokens", text),
        post("/inspect/tokens", { ...text, ablate })]);
      const tokens = [one, other].map((answer) => answer.choices[0].token_details);
      const first = tokens[0].findIndex((token, i) => token.id !== tokens[1][i]?.id);
      result.replaceChildren(...["As it is", "Ablated"].map((title, i) => {
        const shownText = new TokenText(title);
        shownText.add(tokens[i]);
        if (first >= 0) [...shownText.box.children].slice(first).forEach((span) => span.classList.add("differs"));
        const sum = nats([before, after][i].nats);
        return el("article", { class: "card", "aria-label": title }, el("h3", {}, title), shownText.box,
          el("p", { class: "facts" }, `the text above: ${sum} nats; what is written ${first < 0 ? "is the same" : `differs from token ${first + 1} on`}`));
      }));
    } catch (error) {
      result.replaceChildren();
      page.fail(error);
    }
  }

  return el("section", {}, el("h2", {}, "Ablation"), el("p", { class: "hint" }, "An ablated head gives zeros; an ablated ",
    "layer adds nothing. The prompt is continued with the same seed, with and without."),
  el("div", { class: "scroller", tabindex: 0, role: "region", "aria-label": "What to ablate" }, table),
  el("button", { type: "button", id: "ablate", onclick: write }, "Write with and without"), result);
}
