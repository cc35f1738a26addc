// Chat, where the model has a template: turns, the answer as it comes, stop, and another answer.

import { stream } from "./api.js";
import { sampling, set, state, weights } from "./state.js";
import { TokenText, distribution, el, shown } from "./view.js";

const ROLES = { u: "user", a: "assistant" };
let talk = []; // {role, content, tokens}; the tokens of an answer are known where it was written here
let controller = null; // of the answer under way, whatever tab is looked at
let grown = () => {}; // draws more of it where it is looked at
let ended = () => {};

// The conversation as the link has it: who speaks, by a letter, and what.
function kept() {
  return talk.length ? JSON.stringify(talk.map(({ role, content }) => role[0] + content)) : "";
}

function restore() {
  try {
    talk = JSON.parse(state.talk || "[]").map((turn) => ({ role: ROLES[turn[0]] ?? "user", content: turn.slice(1) }));
  } catch {
    talk = []; // a link that was cut off
  }
}

export function render(panel, page) {
  if (!controller && state.talk !== kept()) restore();
  const log = el("div", { class: "talk", role: "log", "aria-label": "Conversation" });
  const details = el("section", { class: "details", "aria-label": "Alternatives of a token" });
  const input = el("textarea", { id: "say", rows: 2, "aria-label": "Your message" });
  const stop = el("button", { type: "button", id: "stop-answer", onclick: () => controller?.abort() }, "Stop answering");
  const again = el("button", { type: "button", onclick: () => another() }, "Another answer");
  const clear = el("button", { type: "button", onclick: () => fresh() }, "New conversation");
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
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      form.requestSubmit();
    }
  });

  function another() {
    if (controller || !talk.length) return;
    if (talk.at(-1).role === "assistant") talk.pop();
    if (!talk.length) return;
    set({ seed: state.seed + 1 });
    document.getElementById("seed").value = state.seed;
    answer();
  }

  function fresh() {
    controller?.abort();
    controller = null;
    talk = [];
    set({ talk: "" });
    draw();
    input.focus();
  }

  function turn({ role, content, tokens }) {
    const body = el("div", {}, content);
    if (tokens) {
      const text = new TokenText("Answer, token by token", {
        look: (at) => {
          text.mark(at);
          const token = text.tokens[at];
          details.replaceChildren(el("h2", {}, `“${shown(token)}”`), distribution(token.top, { chosen: token.id }));
        },
      });
      text.add(tokens);
      body.replaceChildren(text.box);
      grown = (more) => text.add(more); // the last of the turns is the one under way
    }
    return el("article", { class: `turn ${role}` }, el("h3", {}, role === "user" ? "You" : state.model), body);
  }

  function draw() {
    stop.disabled = !controller;
    details.replaceChildren();
    log.replaceChildren(...talk.map(turn));
    if (!talk.length) log.append(el("p", { class: "hint" }, "Say something. Enter sends, Shift+Enter starts a line."));
  }

  async function answer() {
    const own = new AbortController();
    const messages = talk.map(({ role, content }) => ({ role, content }));
    const said = { role: "assistant", content: "", tokens: [] };
    controller = own;
    talk.push(said);
    draw();
    const body = {
      ...weights(), ...sampling(), seed: state.seed, max_tokens: state.max_tokens, logprobs: true, top_logprobs: 20,
      token_details: true, messages,
    };
    try {
      for await (const chunk of stream("/v1/chat/completions", body, own.signal)) {
        if (controller !== own) return;
        for (const choice of chunk.choices) {
          said.content += choice.delta.content ?? "";
          said.tokens.push(...choice.token_details);
          grown(choice.token_details);
        }
      }
    } catch (error) {
      if (error.name !== "AbortError") page.fail(error);
    }
    if (controller !== own) return; // another conversation has begun
    controller = null;
    if (!said.tokens.length) talk.pop();
    set({ talk: kept() });
    ended();
  }

  ended = () => {
    stop.disabled = !controller;
    if (talk.at(-1)?.role !== "assistant") draw();
  };
  panel.replaceChildren(log, form, details);
  draw();
}
