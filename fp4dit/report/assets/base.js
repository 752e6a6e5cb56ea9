"use strict";
// Text from outside (prompts, names, configs) reaches the page by textContent alone: it is shown, never run.
const $ = (id) => document.getElementById(id);
const parsed = new Map();
const data = (id) => {
  if (!parsed.has(id)) parsed.set(id, JSON.parse($(id)?.textContent || "null"));
  return parsed.get(id);
};
const report = data("report");
const { rows, columns, prompts } = report;
const make = (tag, given = {}, ...children) => {
  const { data: dataset = {}, aria = {}, ...own } = given;
  const element = Object.assign(document.createElement(tag), own);
  Object.assign(element.dataset, dataset);
  for (const [name, value] of Object.entries(aria)) element.setAttribute(`aria-${name}`, value);
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
};
const full = (row) => [row.label, row.group].filter(Boolean).join(", ");
const fill = (select, options) => select.replaceChildren(...options.map(([value, text]) => make("option", { value, textContent: text })));
const contains = (text, query) => query.toLowerCase().split(/\s+/).every((word) => text.toLowerCase().includes(word));

const picturable = rows.flatMap((row, i) => (row.images && row.images !== row.reference ? [i] : []));
const state = { row: picturable.at(-1) ?? 0, sort: null, shown: 12, layer: null };
