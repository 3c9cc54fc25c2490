// A note with its answers marked, and the table of its answers.

// Okabe and Ito's colours, which people with any colour vision tell apart; the letters say the same without colour.
const COLOURS = ["#e69f00", "#f0e442", "#56b4e9", "#009e73", "#cc79a7", "#d55e00", "#0072b2", "#999999"];
const data = JSON.parse($("data").textContent);
const names = Object.keys(data.letters);
const colourOf = (name) => COLOURS[Math.max(0, names.indexOf(name)) % COLOURS.length];
const letterOf = (name) => data.letters[name] || "?";
const percent = (p) => (p == null ? "–" : p > 0.995 ? "> 99 %" : p < 0.005 ? "< 1 %" : Math.round(100 * p) + " %");
const words = (name) => name.replaceAll("_", " ");
const badge = (name) => {
  const node = el("span", { class: "letter", title: words(name) }, letterOf(name));
  node.style.background = colourOf(name);
  if (colourOf(name) === "#0072b2") node.style.color = "#fff";
  return node;
};

// A row's marks: the places of its values, those where a value may have been read too, and the right answers'.
function marksOf(rows) {
  const marks = [];
  for (const row of rows) {
    for (const value of row.values)
      value.places.forEach(([start, end], turn) => marks.push({ start, end, name: row.name, kind: turn ? "maybe" : "read", said: `${words(row.name)}: ${value.text}, ${percent(value.p)}${turn ? ", perhaps read here" : ""}` }));
    for (const [start, end] of row.gold_places) marks.push({ start, end, name: row.name, kind: "gold", said: `${words(row.name)}: right answer` });
  }
  return marks;
}

// Lines end as they are; every other character that would act instead of being seen is written as what it is.
const shown = (text) => text.replaceAll("\r\n", "\n").split("\n").flatMap((line, turn) => (turn ? ["\n", ...visible(line)] : visible(line)));

// The note cut where a mark begins or ends. Places count characters (code points), not JavaScript's units.
function drawNote(node, text, rows) {
  const letters = Array.from(text), marks = marksOf(rows), pieces = [];
  const edges = [...new Set([0, letters.length, ...marks.flatMap((mark) => [mark.start, mark.end])])].sort((a, b) => a - b);
  for (let turn = 0; turn + 1 < edges.length; turn++) {
    const [start, end] = [edges[turn], edges[turn + 1]];
    const over = marks.filter((mark) => mark.start <= start && end <= mark.end);
    const content = shown(letters.slice(start, end).join(""));
    pieces.push(over.length ? piece(start, over, content) : content);
  }
  node.replaceChildren(...pieces.flat());
}

function piece(start, over, content) {
  const read = over.filter((mark) => mark.kind === "read"), maybe = over.filter((mark) => mark.kind === "maybe");
  const colours = [...new Set((read.length ? read : maybe).map((mark) => colourOf(mark.name)))];
  const node = el("span", { class: "piece", "data-start": start, title: over.map((mark) => mark.said).join("\n") });
  if (over.some((mark) => mark.kind === "gold")) node.classList.add("gold");
  if (maybe.length && !read.length) node.classList.add("maybe");
  if (read.length) node.style.background = `color-mix(in srgb, ${colours[0]} 30%, transparent)`;
  if (colours.length) {
    node.style.boxShadow = colours.map((colour, turn) => `0 ${3 * (turn + 1)}px 0 ${colour}`).join(", ");
    node.append(...[...new Set((read.length ? read : maybe).filter((mark) => mark.start === start).map((mark) => mark.name))].map(badge));
  }
  node.append(...content);
  return node;
}

// The answers of a note. `more(row)`: what stands in a last column, where there is one.
function drawAnswers(node, rows, note, unsure, more) {
  const gold = rows.some((row) => row.gold != null);
  const head = ["", "question", "answer", "probability", gold ? "right answer" : null, more ? "" : null].filter((text) => text != null);
  const lines = rows.map((row) => {
    const values = row.values.length ? row.values.map((value, turn) => [turn ? "; " : "", place(value, note)]) : row.said || "(no answer)";
    return el("tr", { class: "answer", "data-name": row.name },
      el("td", {}, row.name === "diagnosis" || !data.letters[row.name] ? "" : badge(row.name)),
      el("td", {}, words(row.name)),
      el("td", { class: row.right === false ? "value wrong" : "value" }, values),
      el("td", { class: row.p != null && row.p < unsure ? "n unsure" : "n" }, percent(row.p)),
      gold ? el("td", {}, row.right === false ? "✗ " : row.right ? "✓ " : "", (row.gold || []).join("; ")) : null,
      more ? el("td", {}, more(row)) : null);
  });
  node.replaceChildren(el("table", { class: "answers" }, el("thead", {}, el("tr", {}, head.map((text) => el("th", {}, text)))), el("tbody", {}, lines)));
}

// A value; chosen, it shows the place where it was read.
function place(value, note) {
  const said = value.grounded ? value.text : `${value.text} (not in the note)`;
  if (!value.places.length) return el("span", { title: percent(value.p) }, said);
  const maybe = value.places.length > 1 ? ` (or ${value.places.length - 1} other place${value.places.length > 2 ? "s" : ""})` : "";
  const title = `${percent(value.p)}, characters ${value.places[0].join(" to ")}${maybe}`;
  return [el("button", { class: "link", title, onclick: () => {
    note.querySelectorAll(".chosen").forEach((node) => node.classList.remove("chosen"));
    const [start, end] = value.places[0];
    const pieces = [...note.querySelectorAll(".piece")].filter((node) => +node.dataset.start >= start && +node.dataset.start < end);
    pieces.forEach((node) => node.classList.add("chosen"));
    if (pieces[0]) pieces[0].scrollIntoView({ block: "center" });
  } }, said), maybe];
}

const legend = () => names.map((name) => el("span", {}, badge(name), words(name)));
