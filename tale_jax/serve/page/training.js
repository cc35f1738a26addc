// Through training: one prompt and one seed at each checkpoint that was kept, beside the loss curve.

import { get, post } from "./api.js";
import { lookedAt } from "./inside.js";
import { sampling, set, state, weights } from "./state.js";
import { ending, judge } from "./tree.js";
import { TokenText, debounced, el, heatMap, lossCurve, nats, textOf } from "./view.js";

export async function render(panel, page) {
  const steps = page.checkpoints.map(({ step }) => step);
  if (!steps.includes(state.trained)) set({ trained: steps.at(-1) });
  const losses = await get("/inspect/losses", { model: state.model });
  const label = el("output", { for: "trained" });
  const range = el("input", { type: "range", id: "trained", min: 0, max: steps.length - 1, step: 1, "aria-label": "Checkpoint" });
  range.value = steps.indexOf(state.trained);
  const [curve, result, map] = [el("div"), el("article", { class: "card", "aria-label": "Text" }), el("div", { class: "map" })];
  const every = el("button", { type: "button", id: "every", onclick: () => all() }, "Write at every checkpoint");
  const table = el("div", { class: "scroller", tabindex: 0, role: "region", "aria-label": "Every checkpoint" });
  const hint = steps.length > 2 ? null : el("p", { class: "hint" }, "This run has kept few checkpoints; a run with ",
    el("code", {}, "--config.checkpoint.keep_every=100"), " keeps one of every 100 steps.");
  panel.replaceChildren(hint ?? "", el("div", { class: "row" }, range, label), curve, result,
    el("h2", {}, `Attention of layer ${state.layer}, head ${state.head}, as it forms`), map, every, table);

  const body = (step) => ({ ...weights(state.model, step), ...sampling(), prompt: state.prompt, seed: state.seed,
    max_tokens: state.max_tokens, logprobs: 0, token_details: true });
  const known = new Map();
  async function at(step) {
    const key = JSON.stringify(body(step));
    if (!known.has(key)) {
      const [choice] = (await post("/v1/completions", body(step))).choices;
      const text = state.prompt + choice.text;
      const verdict = page.about.judge && choice.finish_reason === "stop" ? await judge(text).catch(() => null) : null;
      known.set(key, { ...choice, verdict });
    }
    return known.get(key);
  }

  function mark() {
    const loss = page.checkpoints.find(({ step }) => step === state.trained)?.nats_per_token;
    label.textContent = `step ${state.trained.toLocaleString()}: ${nats(loss)} nats/token on validation`;
    range.setAttribute("aria-valuetext", label.textContent);
    curve.replaceChildren(lossCurve(losses, state.trained, (clicked) => {
      const near = steps.reduce((a, b) => (Math.abs(b - clicked) < Math.abs(a - clicked) ? b : a));
      range.value = steps.indexOf(near);
      move();
    }));
  }

  const draw = debounced(async () => {
    const step = state.trained;
    try {
      const choice = await at(step);
      const given = state.text || page.tree.nodes.length ? lookedAt(page) : state.prompt + (await at(steps.at(-1))).text;
      const looked = { ...weights(state.model, step), prompt: given, layer: state.layer, head: state.head };
      const seen = await post("/inspect/attention", looked);
      if (step !== state.trained) return;
      const text = new TokenText(`Text at step ${step}`);
      text.add(choice.token_details);
      const verdict = el("p", { class: "verdict" }, ending(choice.finish_reason, choice.verdict));
      result.replaceChildren(el("p", { class: "of-prompt" }, state.prompt), text.box, verdict);
      map.replaceChildren(heatMap(seen.heads[0].weights, `Attention of layer ${state.layer}, head ${state.head} at step ${step}`));
    } catch (error) {
      page.fail(error);
    }
  }, 150);

  function move() {
    set({ trained: steps[Number(range.value)] });
    mark();
    draw();
  }

  async function all() {
    every.disabled = true;
    const rows = el("tbody");
    table.replaceChildren(el("table", {}, el("thead", {}, el("tr", {}, ...["step", "nats/token", "text", "verdict"].map((name) =>
      el("th", { scope: "col" }, name)))), rows));
    try {
      for (const { step, nats_per_token: loss } of page.checkpoints) {
        const choice = await at(step);
        rows.append(el("tr", {}, el("th", { scope: "row" }, String(step)), el("td", {}, nats(loss)),
          el("td", { class: "long" }, textOf(choice.token_details)), el("td", { class: "long" }, ending(choice.finish_reason, choice.verdict))));
      }
    } catch (error) {
      page.fail(error);
    }
    every.disabled = false;
  }

  range.addEventListener("input", move);
  mark();
  draw();
}
