// Draws a note with its answers marked, and the table of its answers.

// Okabe and Ito's palette for all kinds of colour vision; each question also has a letter.
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

// The marks of the rows: where each value was read, its other possible places ("maybe"), and the gold answers.
function marksOf(rows) {
  const marks = [];
  for (const row of rows) {
    for (const value of row.values)
      value.places.forEach(([start, end], i) => marks.push({ start, end, name: row.name, kind: i ? "maybe" : "read", title: `${words(row.name)}: ${value.text}, ${percent(value.p)}${i ? ", possibly read here" : ""}` }));
    for (const [start, end] of row.gold_places) marks.push({ start, end, name: row.name, kind: "gold", title: `${words(row.name)}: gold answer` });
  }
  return marks;
}

// Text with visible control characters, except for line ends.
const shown = (text) => text.replaceAll("\r\n", "\n").split("\n").flatMap((line, i) => (i ? ["\n", ...visible(line)] : visible(line)));

// The note, split at the edges of all marks. Places count code points, not UTF-16 units.
function drawNote(node, text, rows) {
  const characters = Array.from(text), marks = marksOf(rows), segments = [];
  const edges = [...new Set([0, characters.length, ...marks.flatMap((mark) => [mark.start, mark.end])])].sort((a, b) => a - b);
  for (let i = 0; i + 1 < edges.length; i++) {
    const [start, end] = [edges[i], edges[i + 1]];
    const over = marks.filter((mark) => mark.start <= start && end <= mark.end);
    const content = shown(characters.slice(start, end).join(""));
    segments.push(over.length ? marked(start, over, content) : content);
  }
  node.replaceChildren(...segments.flat());
}

// A segment of the note with the marks over it.
function marked(start, over, content) {
  const read = over.filter((mark) => mark.kind === "read"), maybe = over.filter((mark) => mark.kind === "maybe");
  const coloured = read.length ? read : maybe;
  const colours = [...new Set(coloured.map((mark) => colourOf(mark.name)))];
  const node = el("span", { class: "marked", "data-start": start, title: over.map((mark) => mark.title).join("\n") });
  if (over.some((mark) => mark.kind === "gold")) node.classList.add("gold");
  if (maybe.length && !read.length) node.classList.add("maybe");
  if (read.length) node.style.background = `color-mix(in srgb, ${colours[0]} 30%, transparent)`;
  if (colours.length) {
    node.style.boxShadow = colours.map((colour, i) => `0 ${3 * (i + 1)}px 0 ${colour}`).join(", ");
    node.append(...[...new Set(coloured.filter((mark) => mark.start === start).map((mark) => mark.name))].map(badge));
  }
  node.append(...content);
  return node;
}

// The table of a note's answers; `more(row)` is the content of an additional last column.
function drawAnswers(node, rows, note, unsure, more) {
  const gold = rows.some((row) => row.gold != null);
  const head = ["", "question", "answer", "probability", gold ? "gold answer" : null, more ? "" : null].filter((text) => text != null);
  const lines = rows.map((row) => {
    const values = row.values.length ? row.values.map((value, i) => [i ? "; " : "", place(value, note)]) : row.said || "(no answer)";
    return el("tr", { class: "answer", "data-name": row.name },
      el("td", {}, row.name === "diagnosis" || !data.letters[row.name] ? "" : badge(row.name)),
      el("td", {}, words(row.name)),
      el("td", {}, el("span", { class: row.right === false ? "value wrong" : "value" }, values), row.others.map((other) => el("div", { class: "hint" }, `or ${other.text} (${percent(other.p)})`))),
      el("td", { class: row.p != null && row.p < unsure ? "n unsure" : "n" }, percent(row.p)),
      gold ? el("td", {}, row.right === false ? "✗ " : row.right ? "✓ " : "", (row.gold || []).join("; ")) : null,
      more ? el("td", {}, more(row)) : null);
  });
  node.replaceChildren(el("table", { class: "answers" }, el("thead", {}, el("tr", {}, head.map((text) => el("th", {}, text)))), el("tbody", {}, lines)));
}

// A value in the table; a click scrolls to the place where it was read.
function place(value, note) {
  const text = value.grounded ? value.text : `${value.text} (not in the note)`;
  if (!value.places.length) return el("span", { title: percent(value.p) }, text);
  const maybe = value.places.length > 1 ? ` (or ${value.places.length - 1} other place${value.places.length > 2 ? "s" : ""})` : "";
  const title = `${percent(value.p)}, characters ${value.places[0].join(" to ")}${maybe}`;
  return [el("button", { class: "link", title, onclick: () => {
    note.querySelectorAll(".chosen").forEach((node) => node.classList.remove("chosen"));
    const [start, end] = value.places[0];
    const segments = [...note.querySelectorAll(".marked")].filter((node) => +node.dataset.start >= start && +node.dataset.start < end);
    segments.forEach((node) => node.classList.add("chosen"));
    if (segments[0]) segments[0].scrollIntoView({ block: "center" });
  } }, text), maybe];
}

const legend = () => names.map((name) => el("span", {}, badge(name), words(name)));
