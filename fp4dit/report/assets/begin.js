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
