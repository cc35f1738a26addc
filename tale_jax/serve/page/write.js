// Write: texts side by side, each token with its surprise and what could have stood there, and the tree of branches.

import { post } from "./api.js";
import { sampling, set, state, weights } from "./state.js";
import { ending } from "./tree.js";
import { TokenText, debounced, distribution, el, nats, shown } from "./view.js";

const sampled = (node) => node.tokens.filter((token) => token.logprob_after !== null);

function summary(node) {
  const scored = node.tokens.filter((token) => token.logprob !== null);
  const sum = -scored.reduce((total, token) => total + token.logprob, 0);
  const mean = scored.length ? `, ${nats(sum / scored.length)} nats/token` : "";
  return `${node.tokens.length} tokens${mean}`;
}

export function render(panel, page) {
  const { tree } = page;
  const cards = new Map();
  const grid = el("div", { class: "cards" });
  const nav = el("nav", { "aria-label": "Texts and branches", class: "tree" });
  const details = el("section", { class: "details", "aria-label": "Alternatives of a token" });
  const lead = el("p", { class: "hint" }, "Each token is coloured by its surprise. Point at one, or walk with the ",
    "arrow keys, to see what else could have stood there; choose an alternative to branch the text.");
  panel.replaceChildren(el("div", { class: "legend-row" }, el("span", {}, "expected"), el("span", { class: "scale" }),
    el("span", {}, "surprising (6 nats)")), lead, el("div", { class: "write" }, nav, el("div", {}, grid, details)));

  const alternatives = debounced(async (index, at) => {
    const node = tree.nodes[index];
    if (!node?.tokens[at]) return;
    const token = node.tokens[at];
    let { top } = token;
    if (token.logprob_after === null || !top.length) { // of a prompt: what would be sampled there now
      const ids = node.tokens.slice(0, at).map((other) => other.id);
      const body = { ...weights(), ...sampling(), prompt: ids.length ? ids : "" };
      top = (await post("/inspect/tokens", body).catch(() => ({ positions: [{ top }] }))).positions.at(-1).top;
    }
    const title = `“${shown(token)}”, token ${at + 1}: ${nats(token.logprob === null ? null : -token.logprob)} nats`;
    const pick = (other) => tree.branch(index, at, other);
    details.replaceChildren(el("h2", {}, title), distribution(top, { chosen: token.id, pick }));
  }, 60);

  function card(index) {
    const node = tree.nodes[index];
    const text = new TokenText(`Text ${index + 1}, token by token`, {
      look: (at) => { text.mark(at); alternatives(index, at); },
      pick: () => details.querySelector("button")?.focus(),
    });
    const count = node.parent < 0 ? node.tokens.length - sampled(node).length : node.at;
    text.add(node.tokens, count);
    const facts = el("p", { class: "facts" });
    const end = el("p", { class: "verdict" });
    const article = el("article", { class: "card", "aria-label": `Text ${index + 1}` }, text.box, facts, end);
    article.addEventListener("focusin", () => select(index, false));
    const update = () => {
      facts.textContent = node.writing ? "writing…" : summary(node);
      end.textContent = ending(node.finish, node.verdict);
      end.dataset.accepted = node.verdict ? String(node.verdict.accepted) : "";
    };
    update();
    const more = (tokens) => text.add(tokens, node.parent < 0 ? node.tokens.length - sampled(node).length : node.at);
    cards.set(index, { article, update, more });
    return article;
  }

  function select(index, redraw = true) {
    if (index === state.node && !redraw) return;
    set({ node: index });
    if (redraw) draw();
    else drawTree();
  }

  function drawTree() {
    const list = (parent) => {
      const items = tree.nodes.map((node, i) => [node, i]).filter(([node]) => node.parent === parent);
      return el("ul", {}, ...items.map(([node, index]) => {
        const token = node.tokens[node.at];
        const name = parent < 0 ? `Sample ${index + 1}` : `“${token ? shown(token) : "…"}” at token ${node.at + 1}`;
        const current = index === state.node ? "true" : null;
        const button = el("button", { type: "button", "aria-current": current, onclick: () => select(index) }, name);
        const below = list(index);
        return el("li", {}, button, below.children.length ? below : null);
      }));
    };
    const hadFocus = nav.contains(document.activeElement);
    nav.replaceChildren(tree.nodes.length ? list(-1) : "");
    if (hadFocus) nav.querySelector("[aria-current]")?.focus();
  }

  function draw() {
    cards.clear();
    drawTree();
    const group = tree.siblings(state.node);
    grid.replaceChildren(...group.map(card));
    if (!group.length) grid.append(el("p", { class: "hint" }, "Nothing has been written yet."));
  }

  tree.told = (kind, index, tokens) => {
    page.busy();
    if (kind === "new") draw();
    else if (kind === "more") cards.get(index)?.more(tokens);
    else cards.get(index)?.update();
  };
  draw();
}
