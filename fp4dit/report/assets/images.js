const getImage = (block, index) => (block === null ? null : readData(block)?.[index] ?? null);

function makeImage(source, attributes) {
  const element = makeElement("img", { decoding: "async", draggable: false, ...attributes, src: `data:image/webp;base64,${source}` });
  element.onload = () => element.closest(".card")?.classList.toggle("tiny", element.naturalWidth < 160);
  return element;
}

function makeComparison(i, index) {
  const row = rows[i];
  const [before, after] = [getImage(row.reference, index), getImage(row.images, index)];
  if (before === null || after === null) return makeElement("div", { className: "compare", textContent: "not drawn" });
  const label = `${prompts[index].text}: full precision to the left, ${rowTitle(row)} to the right`;
  const slider = makeElement("input", { type: "range", min: 0, max: 100, value: 50, aria: { label } });
  const box = makeElement("div", { className: "compare" },
    makeElement("div", { className: "stack" }, makeImage(before, { alt: "" }), makeImage(after, { alt: "", className: "quantized" })), slider,
    makeElement("span", { className: "left", textContent: "Full precision" }), makeElement("span", { className: "right", textContent: rowTitle(row) }));
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

const formatScores = (row, index) => report.metrics.flatMap(({ name, title, digits, factor }) => {
  const value = row.scores[name]?.[index] ?? null;
  return value === null ? [] : [`${title} ${(value * factor).toFixed(digits)}`];
});

function makeThumbnail(i, index) {
  const row = rows[i];
  const source = getImage(row.images, index);
  if (source === null) return null;
  const button = makeElement("button", { type: "button", className: "thumb", title: formatScores(row, index).join("\n"), aria: { pressed: String(i === state.row) } },
    makeElement("span", { className: "frame" }, makeImage(source, { alt: "" })), rowTitle(row),
    makeElement("small", { textContent: formatScores(row, index)[0] ?? "" }));
  button.onclick = () => (row.images === row.reference ? null : chooseRow(i));
  return button;
}

function makeCard(index) {
  const { text, seed, group } = prompts[index];
  const about = [seed === null ? null : `seed ${seed}`, group, ...formatScores(rows[state.row], index)].filter(Boolean).join(" · ");
  const strip = makeElement("div", { className: "strip" }, ...rows.map((_, i) => makeThumbnail(i, index)));
  return makeElement("article", { className: "card", data: { index } }, makeComparison(state.row, index),
    makeElement("div", { className: "about" }, makeElement("h3", { textContent: text }), makeElement("p", { className: "meta", textContent: about }), strip));
}

// Says what a row lacks. Shows the command that makes it if the run has the stage, or is not planned yet.
function makeNotice(i, what, stage) {
  const row = rows[i];
  const canMake = row?.fill_command && (!row.stages.length || row.stages.some(({ name }) => name === stage));
  const text = canMake ? `${rowTitle(row)} has no ${what} in the store. Command:` : `There is no ${what} of ${row ? rowTitle(row) : "any row"}.`;
  return makeElement("div", { className: "notice" }, makeElement("p", { textContent: text }), canMake ? makeCommandBox(row.fill_command) : null);
}

function drawImages() {
  const row = rows[state.row];
  const query = $("prompts-filter").value.trim();
  const metric = report.metrics.find(({ name }) => name === $("order").value);
  const values = (metric && row?.scores[metric.name]) || [];
  let order = prompts.map((_, i) => i).filter((i) => getImage(row?.images ?? null, i) !== null && containsWords(prompts[i].text, query));
  const sign = metric?.better === "lower" ? -1 : 1;
  if (metric) order.sort((a, b) => (values[b] === null) - (values[a] === null) || sign * (values[a] - values[b]) || a - b);
  const shown = order.slice(0, state.shown);
  $("cards").replaceChildren(...(order.length || query ? shown.map(makeCard) : [makeNotice(state.row, "images beside full precision", "generate")]));
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

// Frames of a video are below each other in one image. All videos show the same frame.
function showFrame(number) {
  $("frame").value = number;
  $("frame-shown").textContent = `${number} of ${report.frames}`;
  $("images").style.setProperty("--frame", `${(100 * (number - 1)) / (report.frames - 1)}%`);
}

function setPlaying(isPlaying) {
  clearInterval(state.timer);
  state.timer = isPlaying ? setInterval(() => showFrame((Number($("frame").value) % report.frames) + 1), report.frame_milliseconds) : null;
  $("play").setAttribute("aria-pressed", String(isPlaying));
}

function addPlayer() {
  if (report.frames < 2) return;
  $("images").classList.add("film");
  $("player").hidden = false;
  $("frame").max = report.frames;
  $("frame").oninput = () => { setPlaying(false); showFrame(Number($("frame").value)); };
  $("play").onclick = () => setPlaying(state.timer === null);
  showFrame(1);
  setPlaying(!matchMedia("(prefers-reduced-motion: reduce)").matches);
}
