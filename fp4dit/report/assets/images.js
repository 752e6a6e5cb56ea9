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

// What a row has not, and how to make it: where its run has such a stage, or cannot be planned yet.
function absent(i, what, stage) {
  const row = rows[i];
  const made = row?.fill && (!row.stages.length || row.stages.some(({ name }) => name === stage));
  const text = made ? `${full(row)} has no ${what} in the store. To make it:` : `There is no ${what} of ${row ? full(row) : "any row"}.`;
  return make("div", { className: "notice" }, make("p", { textContent: text }), made ? command(row.fill) : null);
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
  $("cards").replaceChildren(...(order.length || query ? shown.map(card) : [absent(state.row, "images beside full precision", "generate")]));
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
