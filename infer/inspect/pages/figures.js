"use strict";
// Unpacks attention weights and draws the figures: grids over layers, the attention map.

const SHADES = 15;

// A layer's attention, inflated once: round(15 · √weight), a byte per (head, kept row, key ≤ row); see page.py.
async function layerOf(run, layer) {
  run.inflated = run.inflated || new Map();
  if (!run.inflated.has(layer)) {
    const packed = Uint8Array.from(atob(run.attention[layer]), (c) => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    run.inflated.set(layer, new Uint8Array(await new Response(stream).arrayBuffer()));
  }
  return run.inflated.get(layer);
}

function offsets(run) {
  if (!run.offsets) {
    run.offsets = [0];
    for (const row of run.rows) run.offsets.push(run.offsets.at(-1) + row + 1);
  }
  return run.offsets;
}

// The shades of one head and query position over keys 0 … position; null if they were not kept.
async function shadesOf(run, layer, head, position) {
  const row = run.rows.indexOf(position);
  if (row < 0 || !run.attention) return null;
  const at = offsets(run), begin = head * at.at(-1) + at[row];
  return (await layerOf(run, layer)).subarray(begin, begin + position + 1);
}
const weightOf = (shade) => (shade / SHADES) ** 2;

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// A grid of values(layer, row): opacity is √(|value| / largest), colour the sign. `pick` is called for a chosen cell.
function grid({ name, columns, rows, rowName, value, describe, chosen, pick, unit }) {
  const top = 14, left = 46, cell = 15, width = left + columns * cell + 2, height = top + rows * cell + 2;
  let most = 0;
  for (let c = 0; c < columns; c++) for (let r = 0; r < rows; r++) most = Math.max(most, Math.abs(value(c, r) || 0));
  const readout = el("p", { class: "hint", "aria-live": "polite" });
  const at = chosen ? [...chosen] : [0, 0];
  const showReadout = () => readout.replaceChildren(describe(at[0], at[1]));
  const svg = el("svg", { class: "figure", viewBox: `0 0 ${width} ${height}`, tabindex: 0, role: "group", "aria-label": name, style: `max-width:${width * 1.6}px` });
  for (let c = 0; c < columns; c += columns > 16 ? 4 : 2) svg.append(el("text", { x: left + c * cell + cell / 2, y: 10, "text-anchor": "middle" }, String(c)));
  for (let r = 0; r < rows; r++) svg.append(el("text", { x: left - 4, y: top + r * cell + 11, "text-anchor": "end" }, rowName(r)));
  for (let c = 0; c < columns; c++) {
    for (let r = 0; r < rows; r++) {
      const v = value(c, r), share = v == null || !most ? 0 : Math.sqrt(Math.abs(v) / most);
      svg.append(el("rect", {
        x: left + c * cell, y: top + r * cell, width: cell - 1, height: cell - 1, "data-cell": `${c},${r}`,
        style: `fill:rgb(var(${v < 0 ? "--less" : "--mark"}) / ${(0.03 + 0.97 * share).toFixed(3)});stroke:var(--line);stroke-width:.4;cursor:pointer`,
        onclick: () => { at[0] = c; at[1] = r; act(); },
        onmouseenter: (event) => showTip(event.currentTarget, [document.createTextNode(describe(c, r))]), onmouseleave: hideTip,
      }));
    }
  }
  const frame = el("rect", { width: cell, height: cell, style: "fill:none;stroke:var(--chosen);stroke-width:1.8;pointer-events:none" });
  svg.append(frame);
  const move = () => { frame.setAttribute("x", left + at[0] * cell - 0.5); frame.setAttribute("y", top + at[1] * cell - 0.5); showReadout(); };
  const act = () => { move(); if (pick) pick(at[0], at[1]); };
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (step) {
      at[0] = Math.max(0, Math.min(columns - 1, at[0] + step[0]));
      at[1] = Math.max(0, Math.min(rows - 1, at[1] + step[1]));
      move();
    } else if (event.key === "Enter" || event.key === " ") act();
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  move();
  return [svg, el("p", { class: "hint" }, unit || "", " Columns are layers; ", el("kbd", {}, "Enter"), pick ? " chooses a cell." : " shows a cell's value."), readout];
}

// Rows are query positions, columns key positions. Lines mark the window's edge, the first row that predicts an answer token, and
// the chosen position.
async function attentionMap(run, layer, head, query, choose) {
  if (!run.attention) return [el("p", { class: "hint" }, "This model's attention maps were left out (see the notice above).")];
  const data = await layerOf(run, layer), at = offsets(run), T = run.ids.length, R = run.rows.length, window_ = run.windows[layer];
  const canvas = el("canvas", { width: T, height: R, role: "img", "aria-label": `attention of layer ${layer}, head ${head}`, "data-head": `${layer}.${head}` });
  const pixels = new ImageData(T, R), seen = colour("--seen").split(" ").map(Number);
  for (let r = 0; r < R; r++) {
    const begin = head * at.at(-1) + at[r], last = run.rows[r];
    for (let k = 0; k < T; k++) {
      const masked = k > last || (window_ != null && k <= last - window_), p = 4 * (r * T + k);
      if (masked) pixels.data.set([128, 128, 128, 46], p);
      else pixels.data.set([seen[0], seen[1], seen[2], (255 * data[begin + k]) / SHADES], p);
    }
  }
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  const place = (event) => {
    const box = canvas.getBoundingClientRect();
    return [Math.min(T - 1, Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * T))), Math.min(R - 1, Math.max(0, Math.floor(((event.clientY - box.top) / box.height) * R)))];
  };
  canvas.addEventListener("click", (event) => choose(run.rows[place(event)[1]]));
  canvas.addEventListener("mousemove", (event) => {
    const [k, r] = place(event), q = run.rows[r], near = { left: event.clientX + 8, top: event.clientY, bottom: event.clientY + 8 };
    const weight = k > q ? "masked: later than the query" : window_ != null && k <= q - window_ ? "masked: outside the window" : `weight ≈ ${number(weightOf(data[head * at.at(-1) + at[r] + k]))}`;
    showTip(near, [el("div", {}, `${q} `, chip(run, run.ids[q]), ` attends to ${k} `, chip(run, run.ids[k])), el("div", {}, weight)]);
  });
  canvas.addEventListener("mouseleave", hideTip);
  const over = el("svg", { viewBox: `0 0 ${T} ${R}`, preserveAspectRatio: "none" });
  const line = (attributes, style) => over.append(el("polyline", { fill: "none", "vector-effect": "non-scaling-stroke", style, ...attributes }));
  if (window_ != null && window_ < T) {
    const points = run.rows.map((q, r) => [Math.max(0, q - window_ + 1), r]).filter(([k]) => k > 0).flatMap(([k, r]) => [`${k},${r}`, `${k},${r + 1}`]);
    line({ points: points.join(" "), class: "window-edge" }, "stroke:var(--edge);stroke-width:2");
  }
  const first = run.rows.findIndex((q) => q >= run.start - 1);
  if (run.start < T && first >= 0) line({ points: `0,${first} ${T},${first}` }, "stroke:var(--soft);stroke-width:1;stroke-dasharray:4 3");
  const chosen = run.rows.indexOf(query);
  if (chosen >= 0) line({ points: `0,${chosen} ${T},${chosen} ${T},${chosen + 1} 0,${chosen + 1} 0,${chosen}` }, "stroke:var(--chosen);stroke-width:1");
  const frame = el("div", { class: "frame" }, canvas, over);
  if (R < T / 4) canvas.style.height = "9rem";
  return [frame];
}
