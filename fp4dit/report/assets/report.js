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

// ---- table

function command(text) {
  const button = make("button", { type: "button", textContent: "Copy" });
  button.onclick = async () => {
    await navigator.clipboard?.writeText(text).catch(() => {});
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = "Copy"), 1500);
  };
  return make("div", { className: "copy" }, make("pre", { className: "command", tabIndex: 0, textContent: text }), button);
}

function cell(found) {
  const text = make(found.best ? "b" : "span", { textContent: found.text });
  const marks = make("span", { textContent: found.marks, className: found.marks.includes("↓") ? "worse" : found.marks.includes("↑") ? "better" : "" });
  return make("td", {}, text, marks, found.spread && make("small", { textContent: found.spread }));
}

function details(i) {
  const row = rows[i];
  const stages = make("dl", {}, ...row.stages.flatMap((stage) => [
    make("dt", { textContent: stage.name }),
    make("dd", { textContent: `${stage.key}  ${stage.state}` }),
  ]));
  const look = make("button", { type: "button", textContent: "Look at its images" });
  look.onclick = () => { choose(i); $("images").scrollIntoView(); };
  const missing = row.fill && [make("p", { textContent: row.problem || "Some of it is missing. To make it:" }), command(row.fill)];
  return make("div", {},
    ...(missing || []), make("p", { textContent: "What makes this row:" }), command(row.command), stages,
    row.images && row.images !== row.reference ? make("p", {}, look) : null,
    make("details", {}, make("summary", { textContent: "Config, resolved" }), make("pre", { tabIndex: 0, textContent: row.config })));
}

function line(i, grouped) {
  const row = rows[i];
  const name = make("button", { type: "button", textContent: row.label, aria: { expanded: "false" } });
  const tag = row.group && !grouped ? make("span", { className: "tag", textContent: row.group }) : null;
  const lacking = row.fill ? make("span", { className: "tag", textContent: row.there ? "incomplete" : "missing" }) : null;
  const own = make("tr", { data: { row: i } }, make("th", { scope: "row" }, name, tag, lacking), ...row.cells.map(cell));
  name.onclick = () => {
    const open = name.getAttribute("aria-expanded") === "true";
    name.setAttribute("aria-expanded", String(!open));
    if (open) own.nextElementSibling.remove();
    else own.after(make("tr", { className: "detail" }, make("td", { colSpan: 1 + columns.length }, details(i))));
  };
  return own;
}

function drawTable() {
  const query = $("rows-filter").value.trim();
  let order = rows.map((_, i) => i).filter((i) => contains(full(rows[i]), query));
  const { sort } = state;
  if (sort) {
    const value = (i) => (sort.column < 0 ? full(rows[i]) : rows[i].cells[sort.column].value);
    const compare = (a, b) => (typeof a === "string" ? a.localeCompare(b) : a - b) * (sort.down ? -1 : 1);
    const known = order.filter((i) => value(i) !== null);
    order = [...known.sort((i, j) => compare(value(i), value(j))), ...order.filter((i) => value(i) === null)];
  }
  const grouped = !sort && rows.some((row) => row.group);
  const lines = order.flatMap((i, k) => {
    const { group } = rows[i];
    const starts = grouped && group && (k === 0 || rows[order[k - 1]].group !== group);
    const heading = starts ? [make("tr", { className: "group" }, make("th", { colSpan: 1 + columns.length, scope: "rowgroup", textContent: group }))] : [];
    return [...heading, line(i, grouped)];
  });
  document.querySelector("tbody").replaceChildren(...lines);
  $("rows-shown").textContent = query ? `${order.length} of ${rows.length} rows` : `${rows.length} rows`;
  document.querySelectorAll("thead th").forEach((th, k) => {
    if (sort && sort.column === k - 1) th.setAttribute("aria-sort", sort.down ? "descending" : "ascending");
    else th.removeAttribute("aria-sort");
  });
}

function drawHead() {
  const titles = [{ title: "Method", better: "lower" }, ...columns];
  const head = titles.map((column, k) => {
    const button = make("button", { type: "button", textContent: column.title, title: column.about || "" });
    button.onclick = () => {
      const first = column.better === "higher"; // best first, then worst first, then as the table was written
      const now = state.sort;
      state.sort = now?.column !== k - 1 ? { column: k - 1, down: first } : now.down === first ? { column: k - 1, down: !first } : null;
      drawTable();
    };
    return make("th", { scope: "col" }, button);
  });
  document.querySelector("thead").replaceChildren(make("tr", {}, ...head));
}

// ---- images

const picture = (block, index) => (block === null ? null : data(block)?.[index] ?? null);

function image(source, given) {
  const found = make("img", { decoding: "async", draggable: false, ...given, src: `data:image/webp;base64,${source}` });
  found.onload = () => found.closest(".card")?.classList.toggle("tiny", found.naturalWidth < 160);
  return found;
}

function compare(i, index) {
  const row = rows[i];
  const [before, after] = [picture(row.reference, index), picture(row.images, index)];
  if (before === null || after === null) return make("div", { className: "compare", textContent: "not drawn" });
  const label = `${prompts[index].text}: full precision to the left, ${full(row)} to the right`;
  const slider = make("input", { type: "range", min: 0, max: 100, value: 50, aria: { label } });
  const box = make("div", { className: "compare" },
    make("div", { className: "stack" }, image(before, { alt: "" }), image(after, { alt: "", className: "made" })), slider,
    make("span", { className: "left", textContent: "Full precision" }), make("span", { className: "right", textContent: full(row) }));
  const show = () => box.style.setProperty("--at", `${slider.value}%`);
  const follow = (event) => {
    const { left, width } = box.getBoundingClientRect();
    slider.value = (100 * (event.clientX - left)) / width;
    show();
  };
  box.onpointerdown = (event) => { box.setPointerCapture(event.pointerId); follow(event); slider.focus({ preventScroll: true }); };
  box.onpointermove = (event) => event.buttons && follow(event);
  slider.oninput = show;
  show();
  return box;
}

const scored = (row, index) => report.metrics.flatMap(({ name, title, digits, factor }) => {
  const value = row.scores[name]?.[index] ?? null;
  return value === null ? [] : [`${title} ${(value * factor).toFixed(digits)}`];
});

function thumb(i, index) {
  const row = rows[i];
  const source = picture(row.images, index);
  if (source === null) return null;
  const button = make("button", { type: "button", className: "thumb", title: scored(row, index).join("\n"), aria: { pressed: String(i === state.row) } },
    make("span", { className: "frame" }, image(source, { alt: "" })), full(row),
    make("small", { textContent: scored(row, index)[0] ?? "" }));
  button.onclick = () => (row.images === row.reference ? null : choose(i));
  return button;
}

function card(index) {
  const { text, seed, group } = prompts[index];
  const about = [seed === null ? null : `seed ${seed}`, group, ...scored(rows[state.row], index)].filter(Boolean).join(" · ");
  const strip = make("div", { className: "strip" }, ...rows.map((_, i) => thumb(i, index)));
  return make("article", { className: "card", data: { index } }, compare(state.row, index),
    make("div", { className: "about" }, make("h3", { textContent: text }), make("p", { className: "meta", textContent: about }), strip));
}

function absent(i, what) {
  const row = rows[i];
  const text = row?.fill ? `${full(row)} has no ${what} in the store. To make it:` : `There is no ${what} of ${row ? full(row) : "any row"}.`;
  return make("div", { className: "notice" }, make("p", { textContent: text }), row?.fill ? command(row.fill) : null);
}

function drawImages() {
  const row = rows[state.row];
  const query = $("prompts-filter").value.trim();
  const metric = report.metrics.find(({ name }) => name === $("order").value);
  const values = (metric && row?.scores[metric.name]) || [];
  let order = prompts.map((_, i) => i).filter((i) => picture(row?.images ?? null, i) !== null && contains(prompts[i].text, query));
  const sign = metric?.better === "lower" ? -1 : 1;
  if (metric) order.sort((a, b) => (values[b] === null) - (values[a] === null) || sign * (values[a] - values[b]) || a - b);
  const shown = order.slice(0, state.shown);
  $("cards").replaceChildren(...(order.length || query ? shown.map(card) : [absent(state.row, "images beside full precision")]));
  $("prompts-shown").textContent = `${shown.length} of ${order.length} prompts`;
  $("more").hidden = shown.length === order.length;
}

function drawView() {
  const [section, view] = [$("images"), $("view").value];
  section.dataset.view = view;
  section.style.setProperty("--size", $("size").value);
  section.style.setProperty("--gain", $("gain").value);
  section.style.setProperty("--ratio", report.ratio);
  $("gain-label").hidden = view !== "difference";
}

// ---- plots

const NAMES = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["lasso2d", "select2d"] };
const COLOURS = ["#4477aa", "#ee6677", "#228833", "#b8860b", "#66ccee", "#aa3377", "#999999", "#e08214", "#5e4fa2", "#35978f"];
const SYMBOLS = ["circle", "square", "diamond", "cross", "x", "triangle-up", "star"];
const colour = (k) => COLOURS[k % COLOURS.length];
const grey = () => getComputedStyle($("made")).color;
// Names as an axis shows them, unless two would then be the same.
const brief = (names) => {
  const short = names.map((name) => name.replace(/^\w*blocks\./, "")).map((name) => (name.length > 24 ? `…${name.slice(-23)}` : name));
  return new Set(short).size === new Set(names).size ? short : names;
};

function plotly() {
  if (!window.Plotly) document.head.append(make("script", { textContent: $("plotly").textContent }));
  return window.Plotly;
}

function plot(id, traces, layout = {}) {
  const style = getComputedStyle(document.body);
  const grid = getComputedStyle(document.querySelector("section")).borderBottomColor;
  const axis = (own) => ({ gridcolor: grid, linecolor: grid, zerolinecolor: grid, automargin: true, ...own });
  const { xaxis, yaxis, yaxis2, ...others } = layout;
  plotly().react($(id), traces, {
    paper_bgcolor: "transparent", plot_bgcolor: "transparent", font: { color: style.color, family: style.fontFamily, size: 12 },
    margin: { l: 60, r: 20, t: 20, b: 50 }, height: innerWidth < 700 ? 560 : 440, hoverlabel: { namelength: -1 },
    legend: { font: { color: grey() }, orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
    ...others, xaxis: axis(xaxis), yaxis: axis(yaxis), ...(yaxis2 ? { yaxis2: axis(yaxis2) } : {}),
  }, NAMES);
  $(id).closest("figure").hidden = false;
}

function lacking(id, i, what) {
  if (window.Plotly) window.Plotly.purge($(id));
  $(id).replaceChildren(absent(i, what));
}

function drawFront() {
  const found = report.fronts.find((front) => front.quality === $("quality").value && front.cost === $("cost").value);
  if (!found) return lacking("front", -1, "pair of a quality and a cost");
  const { points, front } = found;
  const line = front.map((k) => points[k]);
  const middle = (Math.min(...points.map((p) => p.x)) + Math.max(...points.map((p) => p.x))) / 2;
  const steps = { x: line.map((p) => p.x), y: line.map((p) => p.y), mode: "lines", line: { shape: "hv", dash: "dot", color: grey() }, hoverinfo: "skip", showlegend: false };
  const marks = points.map((p, k) => ({
    x: [p.x], y: [p.y], name: full(rows[p.row]), mode: "markers+text", text: [front.includes(k) ? full(rows[p.row]) : ""], textposition: p.x > middle ? "top left" : "top right", cliponaxis: false,
    marker: { size: front.includes(k) ? 13 : 9, symbol: SYMBOLS[p.row % SYMBOLS.length], color: colour(p.row) },
    error_y: { type: "data", symmetric: false, array: [p.high - p.y], arrayminus: [p.y - p.low], thickness: 1, width: 3 },
    hovertemplate: "%{x:.4~g}, %{y:.4~g}<extra>%{fullData.name}</extra>",
  }));
  plot("front", [steps, ...marks], { xaxis: { title: { text: found.cost_title } }, yaxis: { title: { text: found.quality_title } } });
}

function drawHeat() {
  const found = data(`layers-${state.row}`)?.sqnr;
  if (!found) return lacking("sqnr", state.row, "quantized activations");
  const height = Math.max(300, Math.min(1400, 110 + 13 * found.layers.length));
  plot("sqnr", [{
    type: "heatmap", x: found.timesteps.map(String), y: brief(found.layers), customdata: found.layers.map((layer) => found.timesteps.map(() => layer)), z: found.values, zmin: report.sqnr[0], zmax: report.sqnr[1],
    colorscale: "Viridis", colorbar: { title: { text: "dB" }, thickness: 12 }, hovertemplate: "%{customdata}<br>timestep %{x}: %{z:.1f} dB<extra></extra>",
  }], { height, xaxis: { title: { text: "timestep, from noise to image" }, type: "category" }, yaxis: { autorange: "reversed", tickfont: { size: 9 } } });
  $("sqnr").removeAllListeners("plotly_click");
  $("sqnr").on("plotly_click", ({ points }) => { state.layer = points[0].customdata; drawValues(); $("values").scrollIntoView({ behavior: "smooth" }); });
}

function drawErrors() {
  const traces = rows.flatMap((row, i) => (row.blocks.length ? [{
    x: brief(row.blocks.map((block) => block.unit)), y: row.blocks.map((block) => block.error), name: full(row), mode: "lines+markers",
    line: { color: colour(i), width: i === state.row ? 3 : 1.25 }, marker: { size: 4 },
  }] : []));
  if (!traces.length) return lacking("errors", state.row, "rounded weights");
  plot("errors", traces, { xaxis: { title: { text: "block" }, type: "category" }, yaxis: { type: "log", title: { text: "relative error" }, exponentformat: "power" } });
}

function drawCurves() {
  const curves = (data(`layers-${state.row}`)?.curves ?? []).filter((curve) => curve.step.length > 1);
  if (!curves.length) return lacking("curves", state.row, "curve of learning (rounding to nearest learns nothing)");
  const names = brief(curves.map((curve) => curve.unit));
  const traces = curves.map((curve, k) => ({ x: curve.step, y: curve.error, name: names[k], mode: "lines", line: { color: colour(k) } }));
  plot("curves", traces, { xaxis: { title: { text: "step" } }, yaxis: { type: "log", title: { text: "relative error" }, exponentformat: "power" } });
}

function drawHistogram(id, found, what) {
  if (!found) return;
  const { levels, low, high, counts, taken, beyond } = found;
  const width = (high - low) / counts.length;
  const share = (list) => { const total = list.reduce((a, b) => a + b, 0) || 1; return list.map((count) => (100 * count) / total); };
  const type = $("log").checked ? "log" : "linear";
  const bars = { type: "bar", x: counts.map((_, k) => low + (k + 0.5) * width), y: share(counts), width, marker: { color: COLOURS[0] }, name: "before rounding, per bin",
    hovertemplate: "%{x:.2f}: %{y:.2f} %<extra></extra>" };
  const marks = taken
    ? { x: levels, y: share(taken), yaxis: "y2", mode: "markers", marker: { color: COLOURS[1], size: 7 }, name: "rounded to the level", hovertemplate: "level %{x}: %{y:.1f} %<extra></extra>" }
    : { x: levels, y: levels.map(() => 0), yaxis: "y2", mode: "markers", marker: { color: COLOURS[1], symbol: "line-ns-open", size: 8 }, name: "levels", hovertemplate: "level %{x}<extra></extra>" };
  const drawn = levels.length > 64 ? [] : levels.map((level) => ({ type: "line", x0: level, x1: level, yref: "paper", y0: 0, y1: 1, line: { color: COLOURS[1], width: 0.6, dash: "dot" } }));
  plot(id, [bars, marks], { height: 360, bargap: 0, shapes: drawn, xaxis: { title: { text: `${what}, in units of its scale` }, zeroline: false },
    yaxis: { title: { text: "%" }, type }, yaxis2: { overlaying: "y", side: "right", showgrid: false, rangemode: "tozero", visible: Boolean(taken), type: taken ? type : "linear", ...(taken ? {} : { range: [-0.02, 1] }) } });
  $(`${id}-text`).textContent = `${levels.length} levels; ${(100 * beyond).toPrecision(2)} % of the values lie beyond the ends of the grid.`;
}

function drawValues() {
  const found = data(`layers-${state.row}`)?.histograms;
  const names = found ? [...new Set([...Object.keys(found.weight), ...Object.keys(found.activation)])] : [];
  for (const id of ["weight", "activation"]) { $(`${id}-text`).textContent = ""; if (!found) $(id).replaceChildren(); }
  if (!found) return lacking("weight", state.row, "histograms");
  state.layer = names.includes(state.layer) ? state.layer : names[Math.floor(names.length / 2)];
  fill($("layer"), names.map((name) => [name, name]));
  $("layer").value = state.layer;
  for (const id of ["weight", "activation"]) {
    $(id).closest("figure").hidden = !found[id][state.layer];
    drawHistogram(id, found[id][state.layer], id);
  }
}

// ---- the whole

const DRAWN = { tradeoff: [drawFront], images: [drawImages], layers: [drawHeat], blocks: [drawErrors, drawCurves], values: [drawValues] };
const seen = new Set();
const redraw = (section) => seen.has(section) && DRAWN[section].forEach((draw) => draw());

function choose(i) {
  state.row = i;
  document.querySelectorAll(".method").forEach((select) => (select.value = i));
  for (const section of ["images", "layers", "blocks", "values"]) redraw(section);
}

function begin() {
  document.querySelector(".name").textContent = `FP4DiT · ${report.name}`;
  $("table-title").textContent = report.heading;
  $("against").replaceChildren(...report.against.map((text) => make("li", { textContent: `Not as in the papers: ${text}` })));
  $("footnotes").replaceChildren(...report.footnotes.map((text) => make("li", { textContent: text })));
  $("encoding").textContent = report.encoding;
  $("made").textContent = report.made;
  if (report.fill) {
    $("empty").hidden = false;
    $("empty").append(make("p", { textContent: report.fill.text }), command(report.fill.command));
  }
  document.querySelectorAll(".method").forEach((select) => {
    fill(select, rows.map((row, i) => [i, full(row)]));
    select.value = state.row;
    select.onchange = () => choose(Number(select.value));
  });
  fill($("order"), [...report.metrics.map(({ name, title }) => [name, `Worst ${title} first`]), ["", "As drawn"]]);
  const uniques = (key) => [...new Map(report.fronts.map((front) => [front[key], front[`${key}_title`]]))];
  fill($("quality"), uniques("quality"));
  fill($("cost"), uniques("cost"));
  drawHead();
  drawTable();
  drawView();
}

function listen() {
  $("rows-filter").oninput = drawTable;
  $("prompts-filter").oninput = $("order").onchange = () => redraw("images");
  $("view").onchange = $("gain").onchange = $("size").onchange = drawView;
  $("quality").onchange = $("cost").onchange = () => redraw("tradeoff");
  $("log").onchange = () => redraw("values");
  $("layer").onchange = () => { state.layer = $("layer").value; redraw("values"); };
  $("more").onclick = ({ target }) => {
    state.shown = target.dataset.count === "all" ? Infinity : state.shown + Number(target.dataset.count);
    redraw("images");
  };
  const plots = () => Object.keys(DRAWN).filter((section) => section !== "images").forEach(redraw);
  $("theme").onchange = () => { document.documentElement.style.colorScheme = $("theme").value; plots(); };
  matchMedia("(prefers-color-scheme: dark)").onchange = plots;
  const near = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (isIntersecting && !seen.has(target.id)) { seen.add(target.id); redraw(target.id); }
    }
  }, { rootMargin: "400px" });
  for (const section of Object.keys(DRAWN)) near.observe($(section));
}

begin();
listen();
