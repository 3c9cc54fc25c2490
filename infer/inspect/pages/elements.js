"use strict";
// Elements of a page. Text from the data reaches it as text nodes only, never as markup.

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

// A character that would act instead of being seen is written as what it is.
function visible(text) {
  const parts = [];
  for (const letter of text) {
    const code = letter.codePointAt(0);
    if (letter === "\n") parts.push(el("span", { class: "odd" }, "⏎"), "\n");
    else if (letter === "\t") parts.push(el("span", { class: "odd" }, "⇥"), "\t");
    else if (code < 32 || code === 127) parts.push(el("span", { class: "odd" }, String.fromCodePoint(code === 127 ? 0x2421 : 0x2400 + code)));
    else if (/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Co}\p{Cn}]/u.test(letter)) parts.push(el("span", { class: "odd" }, "U+" + code.toString(16).toUpperCase().padStart(4, "0")));
    else if (typeof parts.at(-1) === "string") parts.push(parts.pop() + letter);
    else parts.push(letter);
  }
  return parts;
}
