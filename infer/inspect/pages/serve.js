// Sends the note to the server and shows the answers as they are generated.

const token = location.hash.slice(1); // a fragment is not sent with the URL, so it is in no log
const headers = { "Content-Type": "application/json", ...(token ? { Authorization: `Bearer ${token}` } : {}) };
const UNSURE = 0.5;
let running = null;

async function post(path, body) {
  const response = await fetch(path, { method: "POST", headers, body: JSON.stringify(body), signal: running.signal });
  if (response.ok) return response;
  throw new Error((await response.json().catch(() => ({}))).error || `the server answered ${response.status}`);
}

// The server-sent events of a response, as [name, value].
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let incomplete = "";
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    const blocks = (incomplete + part.value).split("\n\n");
    incomplete = blocks.pop();
    for (const block of blocks) {
      const [, name, value] = /^event: (.*)\ndata: (.*)$/.exec(block);
      yield [name, JSON.parse(value)];
    }
  }
}

async function askOne(id, text, adapter) {
  const card = $(id), rows = new Map(), note = card.querySelector(".note");
  card.hidden = false;
  card.querySelector("h2").textContent = data.model + (adapter ? " with its adapter" : data.adapter ? " without its adapter" : "");
  const draw = () => {
    drawNote(note, text, [...rows.values()]);
    const shown = [...names, "diagnosis"].map((name) => rows.get(name)).filter(Boolean);
    drawAnswers(card.querySelector(".table"), shown, note, UNSURE, (row) => el("button", { class: "look", onclick: () => showTrace(text, row, adapter) }, "trace"));
  };
  draw();
  for await (const [name, value] of eventsOf(await post("/api/stream", { text, adapter }))) {
    if (name === "error") throw new Error(value);
    if (name === "rows") for (const row of value) rows.set(row.name, row);
    draw();
  }
}

async function showTrace(text, row, adapter) {
  await busy(`Tracing ${words(row.name)} …`, async () => {
    const page = await (await post("/api/trace", { text, adapter, ask: row.name })).text();
    $("trace").hidden = false;
    $("trace").querySelector("h2").textContent = `Trace: ${words(row.name)}`;
    $("trace").querySelector("iframe").srcdoc = page;
    $("trace").scrollIntoView();
  });
}

// Runs one task at a time: aborts the running one, and shows status and errors.
async function busy(status, work) {
  if (running) running.abort();
  const mine = (running = new AbortController());
  $("status").className = "";
  $("status").textContent = status;
  $("stop").disabled = false;
  try {
    await work();
    if (running === mine) $("status").textContent = "Done.";
  } catch (error) {
    if (running !== mine) return;
    $("status").className = error.name === "AbortError" ? "" : "warning";
    $("status").textContent = error.name === "AbortError" ? "Stopped." : error.message;
  }
  if (running === mine) $("stop").disabled = true;
}

$("legend").append(...legend());
$("both").hidden = !data.adapter;
$("stop").addEventListener("click", () => running && running.abort());
$("ask").addEventListener("click", () => busy("Answering …", async () => {
  const text = $("text").value;
  $("base").hidden = $("trace").hidden = true;
  await askOne("adapted", text, data.adapter);
  if ($("compare").checked) await askOne("base", text, false);
}));
