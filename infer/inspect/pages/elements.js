"use strict";
// Builds DOM elements. Text from the data is inserted as text nodes, never as markup.

const $ = (id) => document.getElementById(id);

function el(tag, attributes, ...children) {
  const svg = ["svg", "path", "rect", "line", "text", "polyline", "g"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  for (const child of children.flat(Infinity)) if (child != null) node.append(child);
  return node;
}

// Text with control, format and unassigned characters replaced by visible symbols.
function visible(text) {
  const parts = [];
  const symbol = (string) => el("span", { class: "odd" }, string);
  for (const character of text) {
    const code = character.codePointAt(0);
    if (character === "\n") parts.push(symbol("⏎"), "\n");
    else if (character === "\t") parts.push(symbol("⇥"), "\t");
    else if (code < 32 || code === 127) parts.push(symbol(String.fromCodePoint(code === 127 ? 0x2421 : 0x2400 + code)));
    else if (/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Co}\p{Cn}]/u.test(character)) parts.push(symbol("U+" + code.toString(16).toUpperCase().padStart(4, "0")));
    else if (typeof parts.at(-1) === "string") parts.push(parts.pop() + character);
    else parts.push(character);
  }
  return parts;
}
