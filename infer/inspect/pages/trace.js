"use strict";
// The page's state (model, token, layer, head), and the cards drawn from it.

const data = JSON.parse($("data").textContent);
const runs = data.runs;
const first = runs[0];
const state = { run: 0, token: Math.min(first.start, first.ids.length - 1), layer: 0, head: 0, mark: "source" };
const active = () => runs[state.run];

const hint = (...children) => el("p", { class: "hint" }, ...children);
const cell = (content, kind) => el("td", { class: kind }, content);
const table = (titles, rows) => el("table", {}, el("tr", {}, titles.map((title) => el("th", {}, title))), rows);
const numbers = (select, count) =>
  select.replaceChildren(...Array.from({ length: count }, (_, i) => el("option", { value: i }, String(i))));
const add = (values) => values.flat().reduce((total, value) => total + value, 0);

// The query position of a token: for an answer's token the position before, which predicted it; else its own.
const queryOf = (run, token) => (token >= run.start ? token - 1 : token);

// The chosen position in a run: token, query, step and row (-1 if there is none). Runs with other tokens are aligned at the
// start of the answer.
function place(run) {
  let token = state.token;
  if (run !== active() && !sameText(run, active())) {
    token = state.token - active().start + run.start;
    if (token < run.start || token >= run.ids.length) return null;
  }
  const query = queryOf(run, token);
  return { token, query, step: run.steps.indexOf(query), row: run.rows.indexOf(query) };
}

function choose(changes) {
  Object.assign(state, changes);
  const run = active();
  const within = (value, count) => Math.max(0, Math.min(count - 1, value));
  state.layer = within(state.layer, run.layers);
  state.head = within(state.head, run.heads);
  state.token = within(state.token, run.ids.length);
  render();
}

// draw(run, place) for every run side by side, with names if there are two.
const perRun = (draw) =>
  el("div", { class: "runs" }, runs.map((run) => {
    const at = place(run);
    const content = at ? draw(run, at) : hint("No such answer token here.");
    return el("div", {}, runs.length > 1 ? el("h3", {}, run.name) : null, content);
  }));
const perStep = (draw) =>
  perRun((run, at) => (at.step < 0 ? hint("Choose a token of the answer to see this.") : draw(run, at)));

function pressed(event) {
  if (event.key !== "Enter" && event.key !== " ") return;
  event.preventDefault();
  event.stopPropagation();
  event.currentTarget.click();
}

// ---- the head of the page ---------------------------------------------------------------------------------------

function described(run) {
  const windows = [...new Set(run.windows)].map((size) => size ?? "none").join(", ");
  const size = `${run.layers} layers, ${run.heads} heads (${run.groups} key/value heads), window ${windows}`;
  return `${run.name}: ${run.family}, ${size}, ${run.start} prompt tokens, ${run.ids.length - run.start} answer tokens`;
}

function head() {
  document.querySelector("h1").textContent = data.title;
  $("about").textContent = runs.map(described).join(" · ");
  $("notices").replaceChildren(...data.notices.map((line) => el("p", {}, line)));
  for (const [name, { file, line, code }] of Object.entries(data.code)) {
    const node = $(`code-${name}`);
    if (node) node.replaceChildren(el("code", {}, `${file}:${line}`), "  ", el("code", {}, code));
  }
  $("run").replaceChildren(...runs.map((run, i) => el("option", { value: i }, run.name)));
  document.querySelector(".many").hidden = runs.length < 2;
  $("run").addEventListener("change", (event) => choose({ run: +event.target.value }));
  $("layer").addEventListener("change", (event) => choose({ layer: +event.target.value, mark: "head" }));
  $("head").addEventListener("change", (event) => choose({ head: +event.target.value, mark: "head" }));
  $("mark").addEventListener("change", (event) => choose({ mark: event.target.value }));
}

// ---- answers and text -------------------------------------------------------------------------------------------

// Index of the first answer token in which the two runs differ; -1 if there is none.
function firstDifference() {
  const [a, b] = runs.map((run) => run.own.map((id) => JSON.stringify(run.vocabulary[id])));
  const longer = b && b.length > a.length ? b : a;
  return b ? longer.findIndex((_, i) => a[i] !== b[i]) : -1;
}

function answers() {
  const changed = firstDifference();
  const column = (run, index) => {
    const absent = run.own.findIndex((id, i) => id !== run.ids[run.start + i]);  // from here on not in this run's text
    const chips = run.own.map((id, i) => {
      const token = run.start + i;
      const chosen = state.run === index && state.token === token;
      const attributes = { "data-answer": `${index}.${i}`, class: i === changed ? "changed" : "" };
      if (absent >= 0 && i >= absent) return chip(run, id, { ...attributes, title: "not in the traced text" });
      return chip(run, id, {
        ...attributes,
        ...tipped(() => tokenTip(data, run, token)),
        class: `${attributes.class} answer ${chosen ? "query" : ""}`,
        role: "button",
        tabindex: 0,
        "aria-pressed": String(chosen),
        onclick: () => choose({ run: index, token }),
        onkeydown: pressed,
      });
    });
    const none = "No answer was generated; the page shows the prediction of the next token.";
    const name = runs.length > 1 ? el("h3", {}, run.name) : null;
    return el("div", {}, name, el("div", { class: "chips" }, chips.length ? chips : none));
  };
  const differ = changed < 0 ? "Both models give the same answer." : `The answers first differ at token ${changed + 1}.`;
  show("answers", el("div", { class: "runs" }, runs.map(column)), runs.length > 1 ? el("p", {}, differ) : []);
}

function drawTokens() {
  const run = active();
  if ($("tokens").dataset.run === String(state.run)) return;
  $("tokens").dataset.run = state.run;
  const spelt = spellings(run);
  const chips = run.ids.map((id, i) => {
    const tip = () => tokenTip(data, run, i);
    return chip(run, id, {
      ...tipped(tip),
      "data-token": i,
      class: i >= run.start ? "answer" : "",
      role: "button",
      tabindex: -1,
      onclick: () => choose({ token: i }),
      onkeydown: pressed,
      onfocus: (event) => showTip(event.currentTarget, tip()),
      onblur: hideTip,
    }, spelt[i]);
  });
  $("tokens").replaceChildren(...chips);
}

async function markTokens() {
  drawTokens();
  const run = active(), at = place(run), size = run.windows[state.layer];
  const bySource = state.mark === "source" && at.step >= 0;
  const shades = bySource || state.mark === "none" ? null : await shadesOf(run, state.layer, state.head, at.query);
  if (run !== active() || at.token !== state.token) return;
  const values = bySource ? run.attribution.margin.sources[at.step] : [...(shades || [])].map(weightOf);
  const most = Math.max(1e-12, ...values.map(Math.abs));
  const oldest = size == null ? 0 : at.query - size + 1;
  const nodes = [...$("tokens").querySelectorAll("[data-token]")];
  nodes.forEach((node, i) => {
    const value = values[i] || 0, share = Math.abs(value) / most;
    const opacity = (0.1 + 0.6 * share).toFixed(2);
    node.style.background = share > 0.02 ? `rgb(var(${value < 0 ? "--less" : "--mark"}) / ${opacity})` : "";
    node.classList.toggle("query", i === at.token);
    node.classList.toggle("beyond", i > at.token || i < oldest);
    node.classList.toggle("edge", i > 0 && i === oldest);
    node.setAttribute("tabindex", i === at.token ? 0 : -1);
    node.setAttribute("aria-pressed", String(i === at.token));
  });
  const legend = bySource ? "Orange raised the margin over the likeliest other token, blue lowered it."
    : shades ? `Orange: attention of head ${state.layer}.${state.head}.` : "";
  const predicts = [" predicted answer token ", chip(run, run.ids[at.token])];
  $("query").replaceChildren(
    `Position ${at.query} `, chip(run, run.ids[at.query]), ...(at.token >= run.start ? predicts : [" is the query"]),
    `. ${legend}`,
    oldest > 0 ? " The bar is the window's edge; tokens before it are masked." : "",
  );
}

// ---- cards ------------------------------------------------------------------------------------------------------

function headsCard() {
  show("heads", perStep((run, { step }) => {
    const margin = run.attribution.margin, heads = margin.heads[step], mlps = margin.mlps[step], index = runs.indexOf(run);
    const isHead = (h) => h < run.heads;
    const name = (l, h) => (isHead(h) ? `head ${l}.${h}` : `MLP ${l}`);
    const value = (l, h) => (isHead(h) ? heads[l][h] : mlps[l]);
    const take = (l, h) => choose({ run: index, layer: l, ...(isHead(h) ? { head: h, mark: "head" } : {}) });
    const all = heads.flatMap((row, l) => [...row.keys(), run.heads].map((h) => [l, h]));
    all.sort(([l, h], [m, g]) => Math.abs(value(m, g)) - Math.abs(value(l, h)));
    const line = ([l, h]) => {
      const read = isHead(h) ? margin.read[step][l][h] : null;
      const source = read == null ? "" : [chip(run, run.ids[read]), ` at ${read}`];
      return el("tr", {
        "data-head": `${l}.${h}`,
        class: l === state.layer && h === state.head ? "chosen" : "",
        tabindex: 0,
        onclick: () => take(l, h),
        onkeydown: pressed,
      }, cell(name(l, h)), cell(signed(value(l, h)), "n"), cell(source));
    };
    const strongest = all.filter(([, h]) => isHead(h)).slice(0, 8);
    strongest.push(...all.filter(([, h]) => !isHead(h)).slice(0, 3));
    return [
      table(["strongest", "adds", "mostly from"], strongest.map(line)),
      grid({
        name: "contribution of each head and MLP",
        columns: run.layers,
        rows: run.heads + 1,
        rowName: (h) => (isHead(h) ? String(h) : "MLP"),
        value,
        describe: (l, h) => `${name(l, h)}: ${signed(value(l, h))}`,
        chosen: [state.layer, state.head],
        pick: take,
        unit: "Orange is positive, blue negative.",
      }),
      el("p", { class: "hint check" },
        `embedding ${signed(margin.embed[step])}, heads ${signed(add(heads))}, MLPs ${signed(add(mlps))}, ` +
        `biases ${signed(margin.bias[step])}: together ${margin.sum[step].toFixed(4)}; the margin is ` +
        `${margin.value[step].toFixed(4)} (largest difference over the answer ${margin.sum_error.toExponential(1)}). ` +
        "Likeliest other token: ", chip(run, run.attribution.rival[step])),
    ];
  }));
}

async function mapCard() {
  const before = { ...state }, drawn = [];
  for (const [index, run] of runs.entries()) {
    const at = place(run), there = state.layer < run.layers && state.head < run.heads;
    const pick = (token) => choose({ run: index, token });
    const map = there && (await attentionMap(run, before.layer, before.head, at ? at.query : -1, pick));
    const name = runs.length > 1 ? el("h3", {}, run.name) : null;
    drawn.push(el("div", {}, name, map || hint("This model has no such head.")));
  }
  if (["run", "token", "layer", "head"].some((key) => before[key] !== state[key])) return;
  document.querySelector("#map h2").textContent = `Attention map of head ${state.layer}.${state.head}`;
  show("map", el("div", { class: "runs" }, drawn));
}

function lensCard() {
  show("lens", perStep((run, { step }) => {
    const levels = run.lens[step];
    const settled = levels.findLastIndex(([, , , rank]) => rank !== 1) + 1;
    const line = ([best, p, pToken, rank], n) => el("tr", {
      class: n === settled ? "first" : n - 1 === state.layer ? "chosen" : "",
      tabindex: 0,
      onclick: () => choose({ layer: Math.max(0, n - 1) }),
      onkeydown: pressed,
    }, cell(n ? `layer ${n - 1}` : "embedding"), cell(chip(run, best)), cell(number(p), "n"), cell(number(pToken), "n"),
    cell(String(rank), "n"));
    const shown = table(["after", "predicts", "p", "p(token)", "rank"], levels.map(line));
    return el("div", { class: "scroll", tabindex: 0 }, shown);
  }));
}

function loraCard() {
  $("lora").hidden = !runs.some((run) => run.lora.length);
  show("lora", perRun((run, { step }) => {
    const modules = new Map(), kinds = new Set();
    for (const one of run.lora) {
      const [, layer, kind] = one.module.match(/\.layers\.(\d+)\.(?:self_attn|mlp|block_sparse_moe)\.(.*)$/) || [];
      if (kind) modules.set(`${layer} ${kind}`, one), kinds.add(kind);
    }
    if (!kinds.size) return hint("No adapter is active here.");
    const rows = [...kinds];
    const here = (one) => (step >= 0 && one.steps ? one.steps[step] : one.all);
    const at = (l, k) => modules.get(`${l} ${rows[k]}`);
    return grid({
      name: "adapter update by module",
      columns: run.layers,
      rows: rows.length,
      rowName: (k) => rows[k].replace(/_proj$/, "").replace("experts.", ""),
      value: (l, k) => (at(l, k) ? here(at(l, k)) : null),
      describe: (l, k) => (at(l, k) ? `${at(l, k).module}: ${number(here(at(l, k)))}` : "no adapter here"),
      unit: step >= 0 ? "At the position that predicted the token." : "Over the whole text.",
    });
  }));
}

function expertsCard() {
  $("experts").hidden = !runs.some((run) => run.experts);
  show("experts", perRun((run, { row }) => {
    if (!run.experts) return hint("This model has no experts.");
    if (row < 0) return hint("Not kept for this position.");
    const weight = (l, e) => (run.experts[l][row].find(([expert]) => expert === e) || [])[1];
    const shown = (x) => (x == null ? "not chosen" : `weight ${number(x)}`);
    return grid({
      name: "experts chosen in each layer",
      columns: run.layers,
      rows: 1 + Math.max(...run.experts.flat(2).map(([expert]) => expert)),
      rowName: (e) => `expert ${e}`,
      value: weight,
      describe: (l, e) => `layer ${l}, expert ${e}: ${shown(weight(l, e))}`,
      unit: "At the query position.",
    });
  }));
}

function render() {
  hideTip();
  const run = active();
  if ($("layer").length !== run.layers) numbers($("layer"), run.layers);
  if ($("head").length !== run.heads) numbers($("head"), run.heads);
  for (const id of ["run", "layer", "head", "mark"]) $(id).value = state[id];
  answers();
  headsCard();
  lensCard();
  loraCard();
  expertsCard();
  Promise.all([markTokens(), mapCard()]).then(() => {
    document.body.dataset.ready = `${state.run} ${state.token} ${state.layer}.${state.head}`;
  });
}

// ---- keys and initial state -------------------------------------------------------------------------------------

const KEYS = {
  ArrowRight: () => ({ token: state.token + 1 }),
  ArrowLeft: () => ({ token: state.token - 1 }),
  ArrowDown: () => ({ layer: state.layer + 1 }),
  ArrowUp: () => ({ layer: state.layer - 1 }),
  "]": () => ({ head: state.head + 1 }),
  "[": () => ({ head: state.head - 1 }),
  m: () => ({ run: (state.run + 1) % runs.length }),
  a: () => {  // the next answer token, after the last one the first
    const { start, ids } = active(), next = Math.max(start, state.token + 1);
    return { token: next < ids.length ? next : start };
  },
};
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || /^(SELECT|INPUT)$/.test(event.target.tagName)) return;
  if (event.key === "Escape") hideTip();
  if (!(event.key in KEYS)) return;
  event.preventDefault();
  const hadToken = event.target.dataset && event.target.dataset.token;
  choose(KEYS[event.key]());
  if (hadToken !== undefined) document.querySelector(`[data-token="${state.token}"]`).focus();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", render);

head();
// Start at the first answer token that is not white space, and at the head with the largest contribution.
const isVisible = (id) => /\S/.test(new TextDecoder().decode(bytesOf(first, id) || new Uint8Array()));
state.token += Math.max(0, first.own.findIndex(isVisible));
const heads = first.attribution.margin.heads[Math.max(0, first.steps.indexOf(queryOf(first, state.token)))];
const best = Math.max(...heads.flat());
const layer = heads.findIndex((row) => row.includes(best));
choose({ layer, head: heads[layer].indexOf(best) });
