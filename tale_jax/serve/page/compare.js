// Side by side: two models, or two checkpoints of one, on the same prompt with the same seed.

import { get, stream } from "./api.js";
import { sampling, set, state, weights } from "./state.js";
import { TokenText, distribution, el, nats, shown } from "./view.js";

export async function render(panel, page) {
  if (!state.model2) set({ model2: page.models.at(-1).id });
  if (!page.models.some(({ id }) => id === state.model2)) set({ model2: page.models.at(-1).id, step2: 0 });
  const model = el("select", { id: "model2", onchange: () => { set({ model2: model.value, step2: 0 }); choose(); } },
    ...page.models.map(({ id }) => el("option", { value: id }, id)));
  model.value = state.model2;
  const step = el("select", { id: "step2", onchange: () => set({ step2: Number(step.value) }) });
  const columns = el("div", { class: "cards two" });
  const details = el("section", { class: "details", "aria-label": "Alternatives of a token" });
  let controller = new AbortController();
  const go = el("button", { type: "button", class: "primary", id: "compare", onclick: () => write() }, "Write with both");
  panel.replaceChildren(el("p", { class: "hint" }, "The model above, and a second one: a base and what was fine-tuned from ",
    "it, two runs, or two checkpoints."), el("div", { class: "row" }, el("label", {}, "Second model ", model),
    el("label", {}, "Checkpoint ", step), go), columns, details);

  async function choose() {
    const { checkpoints, default: own } = await get("/inspect/checkpoints", { model: state.model2 });
    step.replaceChildren(el("option", { value: 0 }, `served (${own})`),
      ...checkpoints.map((one) => el("option", { value: one.step }, `step ${one.step}`)));
    step.value = state.step2;
  }

  async function column(title, chosen) {
    const text = new TokenText(title, {
      look: (at) => {
        text.mark(at);
        const token = text.tokens[at];
        details.replaceChildren(el("h2", {}, `${title}: “${shown(token)}”`), distribution(token.top, { chosen: token.id }));
      },
    });
    const facts = el("p", { class: "facts" }, "writing…");
    columns.append(el("article", { class: "card", "aria-label": title }, el("h3", {}, title), text.box, facts));
    const body = { ...chosen, ...sampling(), prompt: state.prompt, seed: state.seed, max_tokens: state.max_tokens,
      echo: true, logprobs: 20, token_details: true };
    for await (const chunk of stream("/v1/completions", body, controller.signal)) {
      for (const { token_details: tokens } of chunk.choices) {
        text.add(tokens, text.tokens.length + tokens.filter((token) => token.logprob_after === null).length);
      }
    }
    const sum = -text.tokens.reduce((total, token) => total + token.logprob, 0);
    facts.textContent = `${text.tokens.length} tokens, ${nats(sum / text.tokens.length)} nats/token with the prompt's`;
  }

  async function write() {
    controller.abort();
    controller = new AbortController();
    columns.replaceChildren();
    const name = (id, at) => (at ? `${id}, step ${at}` : id);
    try {
      await Promise.all([column(name(state.model, state.step), weights()),
        column(name(state.model2, state.step2), weights(state.model2, state.step2))]);
    } catch (error) {
      if (error.name !== "AbortError") page.fail(error);
    }
  }

  await choose();
  if (state.run) await write();
}
