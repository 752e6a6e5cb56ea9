const SECTION_RENDERERS = { tradeoff: [drawFront], images: [drawImages], layers: [drawHeat], blocks: [drawErrors, drawCurves], values: [drawValues] };
const visibleSections = new Set();
const redraw = (section) => visibleSections.has(section) && SECTION_RENDERERS[section].forEach((draw) => draw());

function chooseRow(i) {
  state.row = i;
  document.querySelectorAll(".method").forEach((select) => (select.value = i));
  for (const section of ["images", "layers", "blocks", "values"]) redraw(section);
}

function showReport() {
  document.querySelector(".name").textContent = `FP4DiT · ${report.name}`;
  $("table-title").textContent = report.heading;
  $("contradictions").replaceChildren(...report.contradictions.map((text) => makeElement("li", { textContent: `Not as in the papers: ${text}` })));
  $("footnotes").replaceChildren(...report.footnotes.map((text) => makeElement("li", { textContent: text })));
  $("encoding").textContent = report.encoding;
  $("origin").textContent = report.origin;
  if (report.fill_command) {
    $("empty").hidden = false;
    $("empty").append(makeElement("p", { textContent: report.fill_command.text }), makeCommandBox(report.fill_command.command));
  }
  document.querySelectorAll(".method").forEach((select) => {
    fillSelect(select, rows.map((row, i) => [i, rowTitle(row)]));
    select.value = state.row;
    select.onchange = () => chooseRow(Number(select.value));
  });
  fillSelect($("order"), [...report.metrics.map(({ name, title }) => [name, `Worst ${title} first`]), ["", "As drawn"]]);
  const listUnique = (key) => [...new Map(report.fronts.map((front) => [front[key], front[`${key}_title`]]))];
  fillSelect($("quality"), listUnique("quality"));
  fillSelect($("cost"), listUnique("cost"));
  drawHead();
  drawTable();
  drawView();
}

function addListeners() {
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
  const plots = () => Object.keys(SECTION_RENDERERS).filter((section) => section !== "images").forEach(redraw);
  $("theme").onchange = () => { document.documentElement.style.colorScheme = $("theme").value; plots(); };
  matchMedia("(prefers-color-scheme: dark)").onchange = plots;
  const near = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (isIntersecting && !visibleSections.has(target.id)) { visibleSections.add(target.id); redraw(target.id); }
    }
  }, { rootMargin: "400px" });
  for (const section of Object.keys(SECTION_RENDERERS)) near.observe($(section));
}

showReport();
addListeners();
addPlayer();
