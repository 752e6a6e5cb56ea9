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
