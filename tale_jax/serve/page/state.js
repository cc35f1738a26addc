// What the page shows, all of it in the link: what differs from the defaults stands behind the #.

const DEFAULTS = {
  tab: "write",
  model: "",
  step: 0, // 0: the one that the server serves
  prompt: "",
  temperature: 0.8,
  top_k: 0,
  top_p: 1,
  min_p: 0,
  repetition_penalty: 1,
  max_tokens: 120,
  n: 1,
  seed: 1,
  run: false, // texts have been written, so that a link writes them again
  node: 0, // the text that is looked at
  tree: "", // branches: PARENT.TOKENS_KEPT.TOKEN, one after another
  layer: 0,
  head: 0,
  at: -1, // position that is looked at; -1: the last
  text: "", // what is looked into; empty: the text that is looked at
  ablate_heads: "", // LAYER.HEAD, one after another
  ablate_layers: "",
  trained: 0, // checkpoint of "Through training"
  model2: "",
  step2: 0,
  talk: "", // the conversation of "Chat"
};

export const SAMPLING = ["temperature", "top_k", "top_p", "min_p", "repetition_penalty"];
export const state = { ...DEFAULTS };

export function load() {
  Object.assign(state, DEFAULTS);
  for (const [name, value] of new URLSearchParams(location.hash.slice(1))) {
    if (!(name in DEFAULTS)) continue;
    const kind = typeof DEFAULTS[name];
    if (kind === "number" && Number.isFinite(Number(value))) state[name] = Number(value);
    if (kind === "string") state[name] = value;
    if (kind === "boolean") state[name] = value === "true";
  }
}

export function link() {
  const changed = Object.entries(state).filter(([name, value]) => value !== DEFAULTS[name] || name === "prompt");
  return `#${new URLSearchParams(changed)}`;
}

export function set(values) {
  Object.assign(state, values);
  history.replaceState(null, "", link());
}

export function sampling() {
  return Object.fromEntries(SAMPLING.map((name) => [name, state[name]]));
}

// Which weights a request means.
export function weights(model = state.model, step = state.step) {
  return { model, ...(step ? { step } : {}) };
}

export function ablation() {
  const pairs = state.ablate_heads ? state.ablate_heads.split("_").map((pair) => pair.split(".").map(Number)) : [];
  const layers = state.ablate_layers ? state.ablate_layers.split("_").map(Number) : [];
  return { heads: pairs, layers };
}
