// The page: models, prompt and sampling at the side, and a view of them in each tab.

import { get, post, setKey } from "./api.js";
import * as chat from "./chat.js";
import * as compare from "./compare.js";
import * as inside from "./inside.js";
import { link, load, sampling, set, state, weights } from "./state.js";
import * as training from "./training.js";
import { TextTree } from "./tree.js";
import { debounced, distribution, el, setSpecial, slider } from "./view.js";
import * as write from "./write.js";

const VIEWS = {
  write: ["Write", write],
  chat: ["Chat", chat],
  inside: ["Inside", inside],
  training: ["Through training", training],
  compare: ["Side by side", compare],
};
const $ = (id) => document.getElementById(id);

const page = {
  models: [],
  about: null, // of the model that is chosen
  checkpoints: [],
  busy() {
    $("stop").disabled = !page.tree.busy;
    $("status").textContent = page.tree.busy ? "writing…" : page.tree.nodes.length ? "written" : "";
  },
  fail(error) {
    $("error").hidden = false;
    $("error").textContent = error.message;
    $("key-form").hidden = error.status !== 401;
  },
};
page.tree = new TextTree(page);

function calm() {
  $("error").hidden = true;
}

async function choose() {
  const query = { model: state.model };
  [page.about, { checkpoints: page.checkpoints }] = await Promise.all([
    get("/inspect/model", query), get("/inspect/checkpoints", query)]);
  setSpecial(page.about.special_tokens);
  const { params, layers, heads, width, context } = page.about;
  $("about").textContent =
    `${params.toLocaleString()} parameters, ${layers} layers of ${heads} heads, width ${width}, context ${context}`;
  if (!page.checkpoints.some(({ step }) => step === state.step)) set({ step: 0 });
  $("step").replaceChildren(el("option", { value: 0 }, `served (${page.about.step})`),
    ...page.checkpoints.map(({ step }) => el("option", { value: step }, `step ${step}`)));
  $("step").value = state.step;
  drawTabs();
}

function drawTabs() {
  const names = Object.keys(VIEWS).filter((name) => name !== "chat" || page.about.chat);
  if (!names.includes(state.tab)) set({ tab: "write" });
  $("tabs").replaceChildren(...names.map((name) => el("button", {
    type: "button", role: "tab", id: `tab-${name}`, "aria-controls": "panel", "aria-selected": String(name === state.tab),
    tabindex: name === state.tab ? 0 : -1, onclick: () => show(name),
  }, VIEWS[name][0])));
}

$("tabs").addEventListener("keydown", (event) => {
  const tabs = [...$("tabs").children];
  const to = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!to) return;
  const next = tabs[(tabs.indexOf(event.target) + to + tabs.length) % tabs.length];
  next.click();
  $(next.id).focus();
});

async function show(name) {
  calm();
  set({ tab: name });
  drawTabs();
  page.tree.told = () => page.busy();
  $("panel").setAttribute("aria-labelledby", `tab-${name}`);
  $("panel").replaceChildren("…");
  try {
    await VIEWS[name][1].render($("panel"), page);
  } catch (error) {
    $("panel").replaceChildren();
    page.fail(error);
  }
}

// What the model would say after the prompt, as the sliders have it.
let asked = null;
const next = debounced(async () => {
  asked?.abort();
  asked = new AbortController();
  try {
    const body = { ...weights(), ...sampling(), prompt: state.prompt };
    const seen = await post("/inspect/tokens", body, asked.signal);
    const pick = (token) => {
      if (!token.bytes.length) return;
      $("prompt").value = state.prompt + token.text;
      set({ prompt: $("prompt").value });
      next();
    };
    $("next").replaceChildren(distribution(seen.positions.at(-1).top, { pick, verb: "add" }));
    calm();
  } catch (error) {
    if (error.name !== "AbortError") page.fail(error);
  }
}, 100);

function drawControls() {
  $("prompt").value = state.prompt;
  const sliders = [
    ["temperature", "Temperature: 0 is greedy", 0, 2, 0.05],
    ["top_k", "Top k: 0 takes all", 0, 100, 1],
    ["top_p", "Top p", 0.05, 1, 0.01],
    ["min_p", "Min p", 0, 0.5, 0.01],
    ["repetition_penalty", "Repetition penalty", 1, 2, 0.05],
    ["max_tokens", "Max tokens", 1, 400, 1],
    ["n", "Samples side by side", 1, 6, 1],
  ];
  const seed = el("input", { type: "number", id: "seed", min: 0, step: 1, value: state.seed,
    oninput: () => Number.isInteger(seed.valueAsNumber) && set({ seed: seed.valueAsNumber }) });
  $("sliders").replaceChildren(...sliders.map(([name, label, min, max, step]) => slider(name, label, {
    min, max, step, value: state[name], change: (value) => { set({ [name]: value }); next(); },
  })), el("div", { class: "slider" }, el("label", { for: "seed" }, "Seed"), seed));
}

async function writeTexts() {
  calm();
  if (state.tab !== "write") await show("write");
  await page.tree.write();
}

$("controls").addEventListener("submit", (event) => {
  event.preventDefault();
  writeTexts();
});
$("prompt").addEventListener("input", () => { set({ prompt: $("prompt").value }); next(); });
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("controls").requestSubmit();
});
$("stop").addEventListener("click", () => page.tree.stop());
$("again").addEventListener("click", () => {
  set({ seed: state.seed + 1 });
  $("seed").value = state.seed;
  writeTexts();
});
$("model").addEventListener("change", async () => {
  page.tree.clear();
  set({ model: $("model").value, step: 0, run: false });
  await restart();
});
$("step").addEventListener("change", () => { set({ step: Number($("step").value) }); next(); show(state.tab); });
$("link").addEventListener("click", async () => {
  const address = location.origin + location.pathname + link();
  try {
    await navigator.clipboard.writeText(address);
    $("status").textContent = "the link is in the clipboard";
  } catch {
    $("status").textContent = address; // a browser that gives no page the clipboard
  }
});
$("open").addEventListener("change", async () => {
  try {
    const lines = (await $("open").files[0].text()).trim().split("\n");
    const { prompt = "", samples } = JSON.parse(lines.at(-1)); // what sample.py --json prints last
    await show("write");
    await page.tree.open(samples.map(({ text }) => prompt + text));
  } catch (error) {
    page.fail(error instanceof SyntaxError || error instanceof TypeError
      ? new Error("this is not what sample.py --json prints") : error);
  }
  $("open").value = "";
});
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey($("key").value);
  $("key-form").hidden = true;
  start();
});
window.addEventListener("hashchange", () => start());
if (matchMedia("(max-width: 52rem)").matches) { // the text first, where they stand one below the other
  $("sampling").open = false;
  $("after").open = false;
}

async function restart() {
  try {
    await choose();
    await show(state.tab);
    next();
  } catch (error) {
    page.fail(error);
  }
}

async function start() {
  calm();
  load();
  try {
    page.models = (await get("/v1/models")).data;
    if (!page.models.some(({ id }) => id === state.model)) set({ model: page.models[0].id, step: 0 });
    $("model").replaceChildren(...page.models.map(({ id }) => el("option", { value: id }, id)));
    $("model").value = state.model;
    await choose();
    if (!location.hash.includes("prompt=") && page.about.judge) set({ prompt: "Once" });
    drawControls();
    next();
    const { run, tree, node, tab } = state;
    await show(tab);
    if (run) {
      await page.tree.write();
      await page.tree.grow(tree);
      set({ node });
      if (tab !== "compare") await show(tab);
    }
  } catch (error) {
    page.fail(error);
  }
}

start();
