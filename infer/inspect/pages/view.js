// Filters and orders the notes, and shows one at a time.

let chosen = [], at = 0;
const limit = () => Number($("limit").value) / 100;
const FILTERS = {
  all: () => true,
  wrong: (note) => note.wrong,
  unsure: (note) => note.least != null && note.least < limit(),
  ungrounded: (note) => note.ungrounded,
};

function choose() {
  chosen = data.notes.filter(FILTERS[$("filter").value]);
  if ($("order").value === "least") chosen.sort((a, b) => (a.least ?? 2) - (b.least ?? 2));
  go(0);
}

function go(to) {
  at = Math.max(0, Math.min(to, chosen.length - 1));
  const note = chosen[at], total = chosen.length < data.notes.length ? ` (${data.notes.length} in all)` : "";
  $("at").value = chosen.length ? at + 1 : 0;
  $("at").max = chosen.length;
  $("count").textContent = `of ${chosen.length}${total}`;
  $("back").disabled = at <= 0;
  $("next").disabled = at >= chosen.length - 1;
  $("id").textContent = note ? note.id : "No note passes the filter";
  drawNote($("note"), note ? note.text : "", note ? note.rows : []);
  if (note && note.error) $("answers").replaceChildren(el("p", { class: "warning" }, note.error));
  else drawAnswers($("answers"), note ? note.rows : [], $("note"), limit());
}

$("legend").append(...legend());
if (!data.notes.some((note) => note.rows.some((row) => row.gold != null))) $("filter").querySelector("[value=wrong]").disabled = true;
for (const id of ["filter", "order", "limit"]) $(id).addEventListener("change", choose);
$("at").addEventListener("change", () => go($("at").value - 1));
$("back").addEventListener("click", () => go(at - 1));
$("next").addEventListener("click", () => go(at + 1));
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || /^(input|select|textarea)$/i.test(event.target.tagName)) return;
  if (event.key === "n") go(at + 1);
  if (event.key === "p") go(at - 1);
});
choose();
