"use strict";
// Text from outside (prompts, names, configs) is set as textContent only, so that it is never run.
const $ = (id) => document.getElementById(id);
const parsedData = new Map();
const readData = (id) => {
  if (!parsedData.has(id)) parsedData.set(id, JSON.parse($(id)?.textContent || "null"));
  return parsedData.get(id);
};
const report = readData("report");
const { rows, columns, prompts } = report;
const makeElement = (tag, attributes = {}, ...children) => {
  const { data: dataset = {}, aria = {}, ...properties } = attributes;
  const element = Object.assign(document.createElement(tag), properties);
  Object.assign(element.dataset, dataset);
  for (const [name, value] of Object.entries(aria)) element.setAttribute(`aria-${name}`, value);
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
};
const rowTitle = (row) => [row.label, row.group].filter(Boolean).join(", ");
const fillSelect = (select, options) => select.replaceChildren(...options.map(([value, text]) => makeElement("option", { value, textContent: text })));
const containsWords = (text, query) => query.toLowerCase().split(/\s+/).every((word) => text.toLowerCase().includes(word));

const picturable = rows.flatMap((row, i) => (row.images && row.images !== row.reference ? [i] : []));
const state = { row: picturable.at(-1) ?? 0, sort: null, shown: 12, layer: null, timer: null };
