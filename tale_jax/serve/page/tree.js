// Texts that were written and their branches: a tree whose every node is a whole text, token by token.

import { post, stream } from "./api.js";
import { sampling, set, state, weights } from "./state.js";
import { textOf } from "./view.js";

export class TextTree {
  // `told(kind, index, tokens)`: a node is "new", has got tokens ("more") or has "ended".
  constructor(page) {
    this.page = page;
    this.nodes = [];
    this.told = () => {};
    this.controller = new AbortController();
  }

  get busy() {
    return this.nodes.some((node) => node.writing);
  }

  stop() {
    this.controller.abort();
    this.controller = new AbortController();
  }

  clear() {
    this.stop();
    this.nodes = [];
    set({ tree: "", node: 0 });
  }

  siblings(index) {
    const parent = this.nodes[index]?.parent ?? -1;
    return this.nodes.map((_, i) => i).filter((i) => this.nodes[i].parent === parent);
  }

  // The texts that follow the prompt, side by side.
  async write() {
    this.clear();
    const start = this.nodes.length;
    for (let i = 0; i < state.n; i++) this.#add({ parent: -1, at: 0, tokens: [], writing: true });
    set({ run: true });
    await this.#run(start, { prompt: state.prompt, n: state.n }, 0);
  }

  // A text that goes on with another token from position `at` of a text on.
  async branch(parent, at, token) {
    const kept = this.nodes[parent].tokens.slice(0, at);
    const known = this.nodes[parent].tokens[at]?.top.find((other) => other.id === token.id);
    const taken = { ...token, ...known, top: this.nodes[parent].tokens[at]?.top ?? [] };
    const index = this.#add({ parent, at, tokens: [...kept, taken], writing: true });
    const step = `${parent}.${at}.${token.id}`;
    set({ tree: state.tree ? `${state.tree}_${step}` : step, node: index });
    this.told("new", index, this.nodes[index].tokens);
    if (token.id === this.page.about.special_tokens.eos) return this.#end(index, "stop");
    const ids = this.nodes[index].tokens.map((other) => other.id);
    await this.#run(index, { prompt: ids, n: 1 }, ids.length);
  }

  // The branches that a link names, one after another.
  async grow(tree) {
    for (const step of tree.split("_").filter(Boolean)) {
      const [parent, at, id] = step.split(".").map(Number);
      const token = this.nodes[parent]?.tokens[at]?.top.find((other) => other.id === id);
      if (token) await this.branch(parent, at, token);
    }
  }

  // Texts from elsewhere: scored as they are.
  async open(texts) {
    this.clear();
    set({ run: false });
    for (const text of texts) {
      const seen = await post("/inspect/tokens", { ...weights(), ...sampling(), prompt: text });
      const tokens = seen.positions.slice(0, -1).map(({ token, ...scores }) => ({ ...token, ...scores }));
      this.told("new", this.#add({ parent: -1, at: 0, tokens }), tokens);
      await this.#end(this.nodes.length - 1, "opened");
    }
  }

  #add(node) {
    this.nodes.push({ finish: null, verdict: null, writing: false, ...node });
    return this.nodes.length - 1;
  }

  async #run(start, more, skip) {
    const body = { ...weights(), ...sampling(), max_tokens: state.max_tokens, seed: state.seed, echo: true };
    const details = { logprobs: 20, token_details: true };
    const mine = this.nodes.slice(start, start + more.n);
    const left = mine.map(() => skip); // tokens of the prompt that the node has already
    if (!skip) mine.forEach((node, i) => this.told("new", start + i, node.tokens));
    try {
      for await (const chunk of stream("/v1/completions", { ...body, ...details, ...more }, this.controller.signal)) {
        for (const choice of chunk.choices) {
          const node = mine[choice.index];
          if (this.nodes[start + choice.index] !== node) return; // written anew meanwhile
          const tokens = choice.token_details.slice(left[choice.index]);
          left[choice.index] = Math.max(0, left[choice.index] - choice.token_details.length);
          node.tokens.push(...tokens);
          if (tokens.length) this.told("more", start + choice.index, tokens);
          if (choice.finish_reason) await this.#end(start + choice.index, choice.finish_reason);
        }
      }
    } catch (error) {
      if (error.name !== "AbortError") this.page.fail(error);
    } finally {
      for (const [i, node] of mine.entries()) {
        if (node.writing && this.nodes[start + i] === node) await this.#end(start + i, "stopped");
      }
    }
  }

  async #end(index, finish) {
    const node = this.nodes[index];
    Object.assign(node, { finish, writing: false });
    this.told("ended", index, []);
    if (this.page.about.judge && finish === "stop") {
      node.verdict = await judge(textOf(node.tokens)).catch(() => null);
      this.told("ended", index, []);
    }
  }
}

export function judge(text, model = state.model) {
  return post("/inspect/judge", { model, text });
}

// How a text ended, and what the judge of the tales says.
export function ending(finish, verdict) {
  const how = { length: "cut off at max tokens", stop: "", stopped: "stopped", opened: "opened from a file" }[finish] ?? "";
  if (!verdict) return how;
  if (!verdict.accepted) return `not accepted: ${verdict.reason}`;
  const floor = verdict.floor_nats_per_token === null ? "" : `, entropy floor ${verdict.floor_nats_per_token.toFixed(3)}`;
  return `accepted: a tale of the grammar, which gives it ${verdict.nats_per_token.toFixed(3)} nats/token${floor}`;
}
