// Chat, where the model has a template: turns, the answer as it comes, stop, and another answer.

import { stream } from "./api.js";
import { sampling, set, state, weights } from "./state.js";
import { TokenText, el } from "./view.js";

const talk = []; // {role, content, tokens}

export function render(panel, page) {
  const log = el("div", { class: "talk", role: "log", "aria-label": "Conversation" });
  const input = el("textarea", { id: "say", rows: 2, "aria-label": "Your message" });
  let controller = null;
  const stop = el("button", { type: "button", disabled: true, onclick: () => controller?.abort() }, "Stop answering");
  const again = el("button", { type: "button", onclick: () => another() }, "Another answer");
  const clear = el("button", { type: "button", onclick: () => { talk.length = 0; draw(); } }, "New conversation");
  const form = el("form", { class: "say" }, input, el("div", { class: "row" },
    el("button", { class: "primary" }, "Send"), stop, again, clear));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (!input.value.trim() || controller) return;
    talk.push({ role: "user", content: input.value });
    input.value = "";
    answer();
  });
  input.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      form.requestSubmit();
    }
  });

  function another() {
    if (controller || !talk.length) return;
    if (talk.at(-1).role === "assistant") talk.pop();
    set({ seed: state.seed + 1 });
    answer();
  }

  function turn({ role, content, tokens }) {
    const body = el("div", {}, content);
    if (tokens) {
      const text = new TokenText("Answer, token by token");
      text.add(tokens);
      body.replaceChildren(text.box);
    }
    return el("article", { class: `turn ${role}` }, el("h3", {}, role === "user" ? "You" : state.model), body);
  }

  function draw() {
    log.replaceChildren(...talk.map(turn));
    if (!talk.length) log.append(el("p", { class: "hint" }, "Say something. Enter sends, Shift+Enter starts a line."));
  }

  async function answer() {
    draw();
    controller = new AbortController();
    stop.disabled = false;
    const text = new TokenText("Answer, token by token");
    log.append(el("article", { class: "turn assistant" }, el("h3", {}, state.model), text.box));
    const said = { role: "assistant", content: "", tokens: text.tokens };
    const body = {
      ...weights(), ...sampling(), seed: state.seed, max_tokens: state.max_tokens, logprobs: true, top_logprobs: 5,
      token_details: true, messages: talk.map(({ role, content }) => ({ role, content })),
    };
    try {
      for await (const chunk of stream("/v1/chat/completions", body, controller.signal)) {
        for (const choice of chunk.choices) {
          said.content += choice.delta.content ?? "";
          text.add(choice.token_details);
        }
      }
    } catch (error) {
      if (error.name !== "AbortError") page.fail(error);
    }
    controller = null;
    stop.disabled = true;
    if (said.content || said.tokens.length) talk.push(said);
  }

  panel.replaceChildren(log, form);
  draw();
}
