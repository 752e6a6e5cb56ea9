const PLOT_CONFIG = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["lasso2d", "select2d"] };
const COLOURS = ["#4477aa", "#ee6677", "#228833", "#b8860b", "#66ccee", "#aa3377", "#999999", "#e08214", "#5e4fa2", "#35978f"];
const SYMBOLS = ["circle", "square", "diamond", "cross", "x", "triangle-up", "star"];
const rowColour = (k) => COLOURS[k % COLOURS.length];
const axisColour = () => getComputedStyle($("origin")).color;
// Shortens names for an axis, unless two of them would become equal.
const shortenNames = (names) => {
  const short = names.map((name) => name.replace(/^\w*blocks\./, "")).map((name) => (name.length > 24 ? `…${name.slice(-23)}` : name));
  return new Set(short).size === new Set(names).size ? short : names;
};

function plotly() {
  if (!window.Plotly) document.head.append(makeElement("script", { textContent: $("plotly").textContent }));
  return window.Plotly;
}

function plot(id, traces, layout = {}) {
  const style = getComputedStyle(document.body);
  const grid = getComputedStyle(document.querySelector("section")).borderBottomColor;
  const axis = (options) => ({ gridcolor: grid, linecolor: grid, zerolinecolor: grid, automargin: true, ...options });
  const { xaxis, yaxis, yaxis2, ...others } = layout;
  plotly().react($(id), traces, {
    paper_bgcolor: "transparent", plot_bgcolor: "transparent", font: { color: style.color, family: style.fontFamily, size: 12 },
    margin: { l: 60, r: 20, t: 20, b: 50 }, height: innerWidth < 700 ? 560 : 440, hoverlabel: { namelength: -1 },
    legend: { font: { color: axisColour() }, orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
    ...others, xaxis: axis(xaxis), yaxis: axis(yaxis), ...(yaxis2 ? { yaxis2: axis(yaxis2) } : {}),
  }, PLOT_CONFIG);
  $(id).closest("figure").hidden = false;
}

function showNotice(id, i, what, stage) {
  if (window.Plotly) window.Plotly.purge($(id));
  $(id).replaceChildren(makeNotice(i, what, stage));
}

function drawFront() {
  const plotData = report.fronts.find((front) => front.quality === $("quality").value && front.cost === $("cost").value);
  if (!plotData) return showNotice("front", -1, "pair of a quality and a cost");
  const { points, front } = plotData;
  const line = front.map((k) => points[k]);
  const middle = (Math.min(...points.map((p) => p.x)) + Math.max(...points.map((p) => p.x))) / 2;
  const steps = { x: line.map((p) => p.x), y: line.map((p) => p.y), mode: "lines", line: { shape: "hv", dash: "dot", color: axisColour() }, hoverinfo: "skip", showlegend: false };
  const marks = points.map((p, k) => ({
    x: [p.x], y: [p.y], name: rowTitle(rows[p.row]), mode: "markers+text", text: [front.includes(k) ? rowTitle(rows[p.row]) : ""], textposition: p.x > middle ? "top left" : "top right", cliponaxis: false,
    marker: { size: front.includes(k) ? 13 : 9, symbol: SYMBOLS[p.row % SYMBOLS.length], color: rowColour(p.row) },
    error_y: { type: "data", symmetric: false, array: [p.high - p.y], arrayminus: [p.y - p.low], thickness: 1, width: 3 },
    hovertemplate: "%{x:.4~g}, %{y:.4~g}<extra>%{fullData.name}</extra>",
  }));
  plot("front", [steps, ...marks], { xaxis: { title: { text: plotData.cost_title } }, yaxis: { title: { text: plotData.quality_title } } });
}

function drawHeat() {
  const heatmap = readData(`layers-${state.row}`)?.sqnr;
  if (!heatmap) return showNotice("sqnr", state.row, "quantized activations", "activate");
  const height = Math.max(300, Math.min(1400, 110 + 13 * heatmap.layers.length));
  plot("sqnr", [{
    type: "heatmap", x: heatmap.timesteps.map(String), y: shortenNames(heatmap.layers), customdata: heatmap.layers.map((layer) => heatmap.timesteps.map(() => layer)), z: heatmap.values, zmin: report.sqnr[0], zmax: report.sqnr[1],
    colorscale: "Viridis", colorbar: { title: { text: "dB" }, thickness: 12 }, hovertemplate: "%{customdata}<br>timestep %{x}: %{z:.1f} dB<extra></extra>",
  }], { height, xaxis: { title: { text: "timestep, from noise to image" }, type: "category" }, yaxis: { autorange: "reversed", tickfont: { size: 9 } } });
  $("sqnr").removeAllListeners("plotly_click");
  $("sqnr").on("plotly_click", ({ points }) => { state.layer = points[0].customdata; drawValues(); $("values").scrollIntoView({ behavior: "smooth" }); });
}

function drawErrors() {
  const traces = rows.flatMap((row, i) => (row.blocks.length ? [{
    x: shortenNames(row.blocks.map((block) => block.unit)), y: row.blocks.map((block) => block.error), name: rowTitle(row), mode: "lines+markers",
    line: { color: rowColour(i), width: i === state.row ? 3 : 1.25 }, marker: { size: 4 },
  }] : []));
  if (!traces.length) return showNotice("errors", state.row, "rounded weights", "reconstruct");
  plot("errors", traces, { xaxis: { title: { text: "block" }, type: "category" }, yaxis: { type: "log", title: { text: "relative error" }, exponentformat: "power" } });
}

function drawCurves() {
  const curves = (readData(`layers-${state.row}`)?.curves ?? []).filter((curve) => curve.step.length > 1);
  if (!curves.length) return showNotice("curves", state.row, "curve of learning (rounding to nearest learns nothing)", "reconstruct");
  const names = shortenNames(curves.map((curve) => curve.unit));
  const traces = curves.map((curve, k) => ({ x: curve.step, y: curve.error, name: names[k], mode: "lines", line: { color: rowColour(k) } }));
  plot("curves", traces, { xaxis: { title: { text: "step" } }, yaxis: { type: "log", title: { text: "relative error, or loss" }, exponentformat: "power" } });
}

function drawHistogram(id, histogram, what) {
  if (!histogram) return;
  const { levels, low, high, counts, level_counts, clipped_share } = histogram;
  const width = (high - low) / counts.length;
  const share = (list) => { const total = list.reduce((a, b) => a + b, 0) || 1; return list.map((count) => (100 * count) / total); };
  const type = $("log").checked ? "log" : "linear";
  const bars = { type: "bar", x: counts.map((_, k) => low + (k + 0.5) * width), y: share(counts), width, marker: { color: COLOURS[0] }, name: "before rounding, per bin",
    hovertemplate: "%{x:.2f}: %{y:.2f} %<extra></extra>" };
  const marks = level_counts
    ? { x: levels, y: share(level_counts), yaxis: "y2", mode: "markers", marker: { color: COLOURS[1], size: 7 }, name: "rounded to the level", hovertemplate: "level %{x}: %{y:.1f} %<extra></extra>" }
    : { x: levels, y: levels.map(() => 0), yaxis: "y2", mode: "markers", marker: { color: COLOURS[1], symbol: "line-ns-open", size: 8 }, name: "levels", hovertemplate: "level %{x}<extra></extra>" };
  const drawn = levels.length > 64 ? [] : levels.map((level) => ({ type: "line", x0: level, x1: level, yref: "paper", y0: 0, y1: 1, line: { color: COLOURS[1], width: 0.6, dash: "dot" } }));
  plot(id, [bars, marks], { height: 360, bargap: 0, shapes: drawn, xaxis: { title: { text: `${what}, in units of its scale` }, zeroline: false },
    yaxis: { title: { text: "%" }, type }, yaxis2: { overlaying: "y", side: "right", showgrid: false, rangemode: "tozero", visible: Boolean(level_counts), type: level_counts ? type : "linear", ...(level_counts ? {} : { range: [-0.02, 1] }) } });
  $(`${id}-text`).textContent = `${levels.length} levels; ${(100 * clipped_share).toPrecision(2)} % of the values lie beyond the ends of the grid.`;
}

function drawValues() {
  const histograms = readData(`layers-${state.row}`)?.histograms;
  const names = histograms ? [...new Set([...Object.keys(histograms.weight), ...Object.keys(histograms.activation)])] : [];
  for (const id of ["weight", "activation"]) { $(`${id}-text`).textContent = ""; if (!histograms) $(id).replaceChildren(); }
  if (!histograms) return showNotice("weight", state.row, "histograms", "histograms");
  state.layer = names.includes(state.layer) ? state.layer : names[Math.floor(names.length / 2)];
  fillSelect($("layer"), names.map((name) => [name, name]));
  $("layer").value = state.layer;
  for (const id of ["weight", "activation"]) {
    $(id).closest("figure").hidden = !histograms[id][state.layer];
    drawHistogram(id, histograms[id][state.layer], id);
  }
}
