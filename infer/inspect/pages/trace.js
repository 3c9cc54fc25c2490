"use strict";
// What is chosen, and the page redrawn around it.

const data = JSON.parse($("data").textContent);
const runs = data.runs;
const first = runs[0];
const state = { run: 0, token: first.start < first.ids.length ? first.start : first.ids.length - 1, layer: 0, head: 0, mark: "source", toward: "margin" };
const MARKS = { source: "orange: added to the logit, blue: took from it", head: "orange: attention of the chosen head" };

const active = () => runs[state.run];
// The position that is studied: an answer's token was written by the position before it, a token of the prompt reads.
const queryOf = (run, token) => (token >= run.start ? token - 1 : token);

// A run's place: its query, its step (−1: none), its kept row (−1: none). Runs of other tokens follow by answer token.
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
  state.layer = Math.max(0, Math.min(run.layers - 1, state.layer));
  state.head = Math.max(0, Math.min(run.heads - 1, state.head));
  state.token = Math.max(0, Math.min(run.ids.length - 1, state.token));
  render();
}

// A figure for every run, under its name where there are two.
const perRun = (draw) => el("div", { class: "runs" }, runs.map((run) => {
  const at = place(run), content = at == null ? [el("p", { class: "hint" }, "no such answer token here")] : draw(run, at);
  return el("div", {}, runs.length > 1 ? el("h3", {}, run.name) : null, content);
}));
const needsStep = (draw) => perRun((run, at) => (at.step < 0 ? [el("p", { class: "hint" }, "Choose a token of the answer.")] : draw(run, at)));

function head() {
  document.querySelector("h1").textContent = data.title;
  const window_ = (run) => { const known = [...new Set(run.windows)]; return known.length === 1 && known[0] == null ? "no window" : `window ${known.map((w) => w ?? "none").join(", ")}`; };
  $("about").textContent = runs.map((run) => `${run.name}: ${run.family}, ${run.layers} layers of ${run.heads} heads (${run.groups} for keys and values), ${window_(run)}, ${run.start} tokens read, ${run.ids.length - run.start} of answer`).join(" · ");
  $("notices").replaceChildren(...data.notices.map((line) => el("p", {}, line)));
  for (const [name, line] of Object.entries(data.code)) if ($(`code-${name}`)) $(`code-${name}`).replaceChildren(el("code", {}, `${line.file}:${line.line}`), "  ", el("code", {}, line.code));
  $("run").replaceChildren(...runs.map((run, i) => el("option", { value: i }, run.name)));
  document.querySelector(".many").hidden = runs.length < 2;
  const fill = (id, count) => $(id).replaceChildren(...Array.from({ length: count }, (_, i) => el("option", { value: i }, String(i))));
  fill("layer", first.layers);
  fill("head", first.heads);
  for (const id of ["run", "layer", "head"]) $(id).addEventListener("change", (event) => choose({ [id]: +event.target.value, ...(id === "run" ? {} : { mark: "head" }) }));
  for (const id of ["mark", "toward"]) $(id).addEventListener("change", (event) => choose({ [id]: event.target.value }));
}

function answers() {
  const [a, b] = runs, changed = b ? Array.from({ length: Math.max(a.own.length, b.own.length) }, (_, i) => i).find((i) => i >= a.own.length || i >= b.own.length || JSON.stringify(a.vocabulary[a.own[i]]) !== JSON.stringify(b.vocabulary[b.own[i]])) : undefined;
  const column = (run, index) => {
    const chips = run.own.map((id, i) => {
      const token = run.start + i, read = run.ids[token] === id && run.own.slice(0, i).every((x, j) => x === run.ids[run.start + j]);
      const attributes = read ? { tabindex: 0, role: "button", onclick: () => choose({ run: index, token }), onkeydown: pressed, "aria-pressed": String(state.run === index && state.token === token), ...tipped(() => tokenTip(data, run, token)) } : { style: "cursor:default", title: "not among the tokens that were read here" };
      return chip(run, id, { ...attributes, "data-answer": `${index}.${i}`, class: `${i === changed ? "changed" : ""} ${read ? "answer" : ""} ${read && state.run === index && state.token === token ? "query" : ""}` });
    });
    return el("div", {}, runs.length > 1 ? el("h3", {}, run.name) : null, el("div", { class: "chips" }, chips.length ? chips : "No answer was generated: the next token's prediction is studied."));
  };
  const body = [el("div", { class: "runs" }, runs.map(column))];
  if (b && sameText(a, b)) {
    const at = a.start - 1 + (changed ?? 0), their = b.predictions[at];
    if (changed === undefined) body.push(el("p", {}, "Both give the same answer."));
    else if (their) body.push(el("p", {}, `The answers first differ at answer token ${changed + 1}: `, changed < a.own.length ? chip(a, a.own[changed]) : "(end)", ` (${number(a.predictions[at].p)} here, ${number(their.p)} in ${b.name}) against `, changed < b.own.length ? chip(b, b.own[changed]) : "(end)", "."));
  } else if (changed !== undefined) body.push(el("p", {}, `The answers first differ at answer token ${changed + 1}.`));
  show("answers", body);
}

function pressed(event) {
  if (event.key !== "Enter" && event.key !== " ") return;
  event.preventDefault();
  event.stopPropagation();
  event.currentTarget.click();
}

function drawTokens() {
  const run = active();
  if ($("tokens").dataset.run === String(state.run)) return;
  $("tokens").dataset.run = state.run;
  const spelt = spellings(run);
  $("tokens").replaceChildren(el("svg", { "aria-hidden": "true" }), ...run.ids.map((id, i) => chip(run, id, {
    "data-token": i, role: "button", tabindex: -1, class: i >= run.start ? "answer" : "", onclick: () => choose({ token: i }), onkeydown: pressed, ...tipped(() => tokenTip(data, run, i)),
    onfocus: (event) => showTip(event.currentTarget, tokenTip(data, run, i)), onblur: hideTip,
  }, spelt[i])));
}

async function markTokens() {
  drawTokens();
  const run = active(), at = place(run), window_ = run.windows[state.layer], nodes = [...$("tokens").querySelectorAll("[data-token]")];
  const shades = run.attention && at.row >= 0 ? await shadesOf(run, state.layer, state.head, at.query) : null;
  if (run !== active() || at.token !== state.token) return;
  const sources = state.mark === "source" && at.step >= 0 ? run.attribution[state.toward].sources[at.step] : null;
  const values = state.mark === "none" ? null : sources || (shades && [...shades].map(weightOf));
  const most = Math.max(1e-12, ...(values || []).map(Math.abs));
  nodes.forEach((node, i) => {
    const v = values && i < values.length ? values[i] : 0, share = Math.abs(v) / most;
    node.style.background = share > 0.02 ? `rgb(var(${v < 0 ? "--less" : "--mark"}) / ${(0.1 + 0.6 * share).toFixed(2)})` : "";
    const edge = window_ != null && i === at.query - window_ + 1 && i > 0;
    node.classList.toggle("query", i === at.token);
    node.classList.toggle("beyond", i > at.token || (window_ != null && i <= at.query - window_));
    node.classList.toggle("edge", edge);
    node.setAttribute("tabindex", i === at.token ? 0 : -1);
    node.setAttribute("aria-pressed", String(i === at.token));
  });
  const how = sources ? MARKS.source : values ? MARKS.head : "";
  $("query").replaceChildren(...(at.token >= run.start ? ["Answer token ", chip(run, run.ids[at.token]), ` was written by position ${at.query} `, chip(run, run.ids[at.query]), "; marked is what it read"] : [`Position ${at.query} `, chip(run, run.ids[at.query]), " and what it read"]), how ? ` (${how}; arcs: head ${state.layer}.${state.head}).` : `; arcs: head ${state.layer}.${state.head}.`, window_ != null && at.query >= window_ ? " The bar is the window's edge: what stands before it is not seen." : "");
  arcs(nodes, at, shades);
}

// Arcs over the text from the position that reads to the keys it weighs most, as wide as their weight.
function arcs(nodes, at, shades) {
  const svg = $("tokens").querySelector("svg"), outer = $("tokens").getBoundingClientRect(), paths = [];
  svg.setAttribute("width", $("tokens").clientWidth);
  svg.setAttribute("height", $("tokens").scrollHeight);
  const centre = (node) => { const box = (node.getClientRects()[0] || node.getBoundingClientRect()); return [box.left + box.width / 2 - outer.left + $("tokens").scrollLeft, box.top - outer.top + $("tokens").scrollTop + 3]; };
  const keys = shades ? [...shades.keys()].filter((k) => shades[k] > 2 && k !== at.query).sort((a, b) => shades[b] - shades[a]).slice(0, 8) : [];
  const [x, y] = centre(nodes[at.query]);
  for (const k of keys) {
    const [u, v] = centre(nodes[k]), lift = Math.min(y, v) - Math.min(46, 10 + Math.abs(x - u) / 8), weight = weightOf(shades[k]);
    paths.push(el("path", { d: `M${x},${y} C${x},${lift} ${u},${lift} ${u},${v}`, "data-arc": k, fill: "none", style: `stroke:rgb(var(--mark));stroke-width:${(1 + 4 * weight).toFixed(1)};opacity:${(0.35 + 0.6 * weight).toFixed(2)}` }));
  }
  svg.replaceChildren(...paths);
}

function headsCard() {
  show("heads", needsStep((run, { step }) => {
    const its = run.attribution[state.toward], heads = its.heads[step], mlps = its.mlps[step];
    const name = (l, h) => (h < run.heads ? `head ${l}.${h}` : `MLP ${l}`), value = (l, h) => (h < run.heads ? heads[l][h] : mlps[l]);
    const ranked = heads.flatMap((row, l) => [...row.map((v, h) => [v, l, h]), [mlps[l], l, run.heads]]).sort((a, b) => Math.abs(b[0]) - Math.abs(a[0]));
    const index = runs.indexOf(run), take = (l, h) => choose(h < run.heads ? { run: index, layer: l, head: h, mark: "head" } : { run: index, layer: l });
    const row = ([v, l, h]) => {
      const read = h < run.heads ? its.read[step][l][h] : null;
      return el("tr", { tabindex: 0, onclick: () => take(l, h), onkeydown: pressed, "data-head": `${l}.${h}`, class: l === state.layer && h === state.head ? "chosen" : "" },
        el("td", {}, name(l, h)), el("td", { class: "n" }, signed(v)), el("td", {}, read == null ? "" : [chip(run, run.ids[read]), ` at ${read}`]));
    };
    const onlyHeads = ranked.filter(([, , h]) => h < run.heads).slice(0, 8), onlyMlps = ranked.filter(([, , h]) => h === run.heads).slice(0, 3);
    const sum = (values) => values.flat().reduce((total, v) => total + v, 0);
    return [
      el("table", {}, el("tr", {}, el("th", {}, "strongest"), el("th", { class: "n" }, "adds"), el("th", {}, "by reading, most of all")), [...onlyHeads, ...onlyMlps].map(row)),
      grid({ name: "what each head and MLP adds", columns: run.layers, rows: run.heads + 1, rowName: (r) => (r < run.heads ? String(r) : "MLP"), value, describe: (l, h) => `${name(l, h)}: ${signed(value(l, h))}`, chosen: [state.layer, state.head], pick: take, unit: "Orange adds, blue takes." }),
      el("p", { class: "hint check" }, `embedding ${signed(its.embed[step])}, heads ${signed(sum(heads))}, MLPs ${signed(sum(mlps))}, biases ${signed(its.bias[step])}: together ${its.sum[step].toFixed(4)}; ${state.toward === "logit" ? "the logit" : "the margin"} is ${its.value[step].toFixed(4)} (largest difference over the answer ${its.sum_error.toExponential(1)}).`,
        state.toward === "margin" ? [" Best other token: ", chip(run, run.attribution.rival[step])] : null),
    ];
  }));
}

async function mapCard() {
  const { layer, head, token, run } = state, drawn = [];
  for (const one of runs) {
    const at = place(one), usable = layer < one.layers && head < one.heads;
    drawn.push(el("div", {}, runs.length > 1 ? el("h3", {}, one.name) : null, usable ? await attentionMap(one, layer, head, at ? at.query : -1, (q) => choose({ run: runs.indexOf(one), token: q })) : el("p", { class: "hint" }, "this model has no such head")));
  }
  if (layer !== state.layer || head !== state.head || token !== state.token || run !== state.run) return;
  document.querySelector("#map h2").textContent = `Attention map of head ${layer}.${head}`;
  show("map", el("div", { class: "runs" }, drawn), el("p", { class: "hint" }, "Down: who reads (a row each); across: what is read. Weight 0 ", el("span", { class: "scale", style: "background:linear-gradient(90deg, transparent, rgb(var(--seen)))" }), " 1, in 16 shades of √weight, so a weight is right to within 0.07 at most; grey is not seen", first.windows.some((w) => w != null) ? ", the solid line is the window's edge" : "", ", below the dashed line are the positions that wrote the answer. Click a row to choose its position."));
}

function lensCard() {
  show("lens", needsStep((run, { step }) => {
    const levels = run.lens[step], settled = levels.findLastIndex((level) => level[3] !== 1) + 1;
    const row = ([best, p, its, rank], n) => el("tr", { class: n === settled ? "first" : n - 1 === state.layer ? "chosen" : "", tabindex: 0, onkeydown: pressed, onclick: () => choose({ layer: Math.max(0, n - 1) }) },
      el("td", {}, n ? `layer ${n - 1}` : "embedding"), el("td", {}, chip(run, best)), el("td", { class: "n" }, number(p)), el("td", { class: "n" }, number(its)), el("td", { class: "n" }, String(rank)));
    return [el("div", { class: "scroll", tabindex: 0 }, el("table", {}, el("tr", {}, el("th", {}, "after"), el("th", {}, "predicts"), el("th", { class: "n" }, "p"), el("th", { class: "n" }, "p(token)"), el("th", { class: "n" }, "rank")), levels.map(row))),
      el("p", { class: "hint" }, "The stream after each layer through the last norm, with that layer's own scale, and the output matrix. p: of what it predicts; p(token), rank: of the actual next token, which from the bold row on is first.")];
  }));
}

function loraCard() {
  if (!runs.some((run) => run.lora.length)) return;
  $("lora").hidden = false;
  show("lora", perRun((run, { step }) => {
    if (!run.lora.length) return [el("p", { class: "hint" }, "No adapter is active here.")];
    const known = run.lora.map((one) => [one, one.module.match(/\.layers\.(\d+)\.(.*)$/)]).filter(([, found]) => found);
    const kinds = [...new Set(known.map(([, found]) => found[2].replace(/^(self_attn|mlp|block_sparse_moe)\./, "")))];
    const at = new Map(known.map(([one, found]) => [`${found[1]} ${found[2].replace(/^(self_attn|mlp|block_sparse_moe)\./, "")}`, one]));
    const value = (l, k) => { const one = at.get(`${l} ${kinds[k]}`); return one ? (step >= 0 && one.steps ? one.steps[step] : one.all) : null; };
    return grid({ name: "the adapter's part by module", columns: run.layers, rows: kinds.length, rowName: (k) => kinds[k].replace(/_proj$/, "").replace("experts.", ""), value, describe: (l, k) => { const one = at.get(`${l} ${kinds[k]}`); return one ? `${one.module}: ${one.steps && step >= 0 ? `${number(one.steps[step])} here, ` : ""}${number(one.all)} over the text` : "no adapter here"; }, unit: step >= 0 ? "At the position that wrote the token." : "Over the whole text." });
  }));
}

function expertsCard() {
  if (!runs.some((run) => run.experts)) return;
  $("experts").hidden = false;
  show("experts", perRun((run, { row }) => {
    if (!run.experts || row < 0) return [el("p", { class: "hint" }, run.experts ? "Not kept for this position." : "This model has no experts.")];
    const count = 1 + Math.max(...run.experts.flat(2).map(([e]) => e));
    const value = (l, e) => { const found = run.experts[l][row].find(([one]) => one === e); return found ? found[1] : null; };
    return grid({ name: "the experts that each layer's router chose", columns: run.layers, rows: count, rowName: (e) => `expert ${e}`, value, describe: (l, e) => `layer ${l}, expert ${e}: ${value(l, e) == null ? "not chosen" : `weight ${number(value(l, e))}`}`, unit: "For the position that reads." });
  }));
}

function render() {
  hideTip();
  const run = active();
  Object.assign($("run"), { value: state.run });
  for (const id of ["layer", "head", "mark", "toward"]) $(id).value = state[id];
  for (const [id, count] of [["layer", run.layers], ["head", run.heads]]) if ($(id).length !== count) { $(id).replaceChildren(...Array.from({ length: count }, (_, i) => el("option", { value: i }, String(i)))); $(id).value = state[id]; }
  answers();
  headsCard();
  lensCard();
  loraCard();
  expertsCard();
  Promise.all([markTokens(), mapCard()]).then(() => { document.body.dataset.ready = `${state.run} ${state.token} ${state.layer}.${state.head}`; });
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || /^(SELECT|INPUT)$/.test(event.target.tagName)) return;
  const run = active(), answer = run.ids.length - run.start, hadToken = event.target.dataset && event.target.dataset.token;
  const changes = {
    ArrowRight: { token: state.token + 1 }, ArrowLeft: { token: state.token - 1 }, ArrowDown: { layer: state.layer + 1 }, ArrowUp: { layer: state.layer - 1 },
    "]": { head: state.head + 1 }, "[": { head: state.head - 1 }, a: answer ? { token: run.start + (state.token < run.start ? 0 : (state.token - run.start + 1) % answer) } : {}, m: { run: (state.run + 1) % runs.length },
  }[event.key];
  if (event.key === "Escape") hideTip();
  if (!changes) return;
  event.preventDefault();
  choose(changes);
  const node = document.querySelector(`[data-token="${state.token}"]`);
  if (hadToken !== undefined) node.focus();
});
addEventListener("resize", () => markTokens());
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", render);

head();
// Begin at the first answer token that can be seen, and at the head that did most for it.
const seen = first.own.findIndex((id) => /[^\s]/.test(new TextDecoder().decode(bytesOf(first, id) || new Uint8Array())));
if (seen > 0) state.token += seen;
const strongest = first.attribution.margin.heads[Math.max(0, first.steps.indexOf(queryOf(first, state.token)))].flatMap((row, l) => row.map((v, h) => [v, l, h])).sort((a, b) => b[0] - a[0])[0];
choose({ layer: strongest[1], head: strongest[2] });
