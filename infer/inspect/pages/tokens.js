// Tokens and the tooltip.

const show = (id, ...children) => document.querySelector(`#${id} .body`).replaceChildren(...children.flat(Infinity));
const number = (x) => (x == null ? "–" : Math.abs(x) >= 1e4 || (x !== 0 && Math.abs(x) < 1e-3) ? x.toExponential(1) : String(+x.toPrecision(3)));
const signed = (x) => (x < 0 ? "−" : "+") + number(Math.abs(x));

function bytesOf(run, id) {
  const hex = run.vocabulary[id][0];
  return hex == null ? null : Uint8Array.from(hex.match(/../g) || [], (pair) => parseInt(pair, 16));
}

function decoded(bytes) {
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch {
    return null;
  }
}

// A token's nodes: its text; its bytes if they are an incomplete UTF-8 sequence; the name of a special token.
function spelling(run, id) {
  const bytes = bytesOf(run, id), text = bytes && decoded(bytes);
  if (bytes == null) return [el("span", { class: "odd" }, ...visible(run.vocabulary[id][1]))];
  if (text == null) return [el("span", { class: "odd" }, "‹" + hexadecimal(bytes) + "›")];
  return /^ +$/.test(text) ? [el("span", { class: "odd" }, "␣".repeat(text.length))] : visible(text);
}
const hexadecimal = (bytes) => [...bytes].map((b) => b.toString(16).toUpperCase().padStart(2, "0")).join(" ");

// The spellings of all tokens of a run. A character whose bytes span several tokens is shown in the first, as "·" in the others.
function spellings(run) {
  const found = [];
  while (found.length < run.ids.length) {
    const at = found.length, bytes = [];
    let text = null, next = at;
    while (text == null && next < at + 6 && next < run.ids.length && bytesOf(run, run.ids[next])) {
      bytes.push(...bytesOf(run, run.ids[next++]));
      text = decoded(Uint8Array.from(bytes));
    }
    if (text == null) found.push(spelling(run, run.ids[at]));
    else found.push(visible(text), ...Array.from({ length: next - at - 1 }, () => [el("span", { class: "odd" }, "·")]));
  }
  return found;
}

// A token as an inline element.
function chip(run, id, attributes, spelt) {
  const special = run.vocabulary[id][0] == null;
  return el("span", { ...attributes, class: `token ${special ? "special" : ""} ${(attributes || {}).class || ""}` }, spelt || spelling(run, id));
}

// The prediction of token i, made at position i − 1.
const predicted = (run, i) => (i > 0 ? run.predictions[i - 1] : null);

function tokenTip(data, run, i) {
  const id = run.ids[i], bytes = bytesOf(run, id), prediction = predicted(run, i);
  const rows = [
    ["position", String(i) + (i >= run.start ? `, answer token ${i - run.start + 1}` : "")],
    ["id", String(id)],
    ["bytes", bytes == null ? "none: a special token" : hexadecimal(bytes)],
  ];
  for (const one of data.runs.filter((other) => other === run || sameText(run, other))) {
    const other = predicted(one, i), name = data.runs.length > 1 ? ` (${one.name})` : "";
    rows.push(["probability" + name, other == null ? "none: the first token" : `${number(other.p)}, rank ${other.rank}`]);
  }
  const table = el("table", {}, rows.map(([name, value]) => el("tr", {}, el("th", {}, name), el("td", {}, value))));
  const best = prediction == null ? [] : prediction.best.map(([other, p]) => el("tr", {}, el("td", {}, chip(run, other)), el("td", { class: "n" }, number(p)), el("td", {}, el("span", { class: "bar", style: `width:${Math.round(p * 80)}px` }))));
  return [el("div", {}, chip(run, id)), table, best.length ? el("div", { class: "hint" }, "likeliest tokens here") : null, el("table", {}, best)];
}

const sameText = (a, b) => a.start === b.start && a.ids.length === b.ids.length && a.ids.every((id, i) => id === b.ids[i]);

function showTip(anchor, children) {
  const tip = $("tip"), box = anchor.getBoundingClientRect ? anchor.getBoundingClientRect() : anchor;
  tip.replaceChildren(...children.filter(Boolean));
  tip.hidden = false;
  const low = box.bottom + 8 + tip.offsetHeight > innerHeight && box.top - 8 - tip.offsetHeight > 0;
  tip.style.left = Math.max(4, Math.min(box.left, innerWidth - tip.offsetWidth - 8)) + "px";
  tip.style.top = (low ? box.top - tip.offsetHeight - 8 : Math.min(box.bottom + 8, innerHeight - tip.offsetHeight - 4)) + "px";
}
const hideTip = () => { $("tip").hidden = true; };
const tipped = (children) => ({
  onmouseenter: (event) => showTip(event.currentTarget, children()),
  onmouseleave: hideTip,
});
