function makeCommandBox(text) {
  const button = makeElement("button", { type: "button", textContent: "Copy" });
  button.onclick = async () => {
    await navigator.clipboard?.writeText(text).catch(() => {});
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = "Copy"), 1500);
  };
  return makeElement("div", { className: "copy" }, makeElement("pre", { className: "command", tabIndex: 0, textContent: text }), button);
}

function makeCell(content) {
  const text = makeElement(content.best ? "b" : "span", { textContent: content.text });
  const marks = makeElement("span", { textContent: content.marks, className: content.marks.includes("↓") ? "worse" : content.marks.includes("↑") ? "better" : "" });
  return makeElement("td", {}, text, marks, content.spread && makeElement("small", { textContent: content.spread }));
}

function makeDetails(i) {
  const row = rows[i];
  const stages = makeElement("dl", {}, ...row.stages.flatMap((stage) => [
    makeElement("dt", { textContent: stage.name }),
    makeElement("dd", { textContent: `${stage.key}  ${stage.state}` }),
  ]));
  const look = makeElement("button", { type: "button", textContent: "Show its images" });
  look.onclick = () => { chooseRow(i); $("images").scrollIntoView(); };
  const missing = row.fill_command && [makeElement("p", { textContent: row.problem || "Some results are missing. To make them:" }), makeCommandBox(row.fill_command)];
  return makeElement("div", {},
    ...(missing || []), makeElement("p", { textContent: "The command of this row:" }), makeCommandBox(row.command), stages,
    row.images && row.images !== row.reference ? makeElement("p", {}, look) : null,
    makeElement("details", {}, makeElement("summary", { textContent: "Resolved config" }), makeElement("pre", { tabIndex: 0, textContent: row.config })));
}

function makeRow(i, grouped) {
  const row = rows[i];
  const name = makeElement("button", { type: "button", textContent: row.label, aria: { expanded: "false" } });
  const tag = row.group && !grouped ? makeElement("span", { className: "tag", textContent: row.group }) : null;
  const stateTag = row.fill_command ? makeElement("span", { className: "tag", textContent: row.has_results ? "incomplete" : "missing" }) : null;
  const tableRow = makeElement("tr", { data: { row: i } }, makeElement("th", { scope: "row" }, name, tag, stateTag), ...row.cells.map(makeCell));
  name.onclick = () => {
    const open = name.getAttribute("aria-expanded") === "true";
    name.setAttribute("aria-expanded", String(!open));
    if (open) tableRow.nextElementSibling.remove();
    else tableRow.after(makeElement("tr", { className: "detail" }, makeElement("td", { colSpan: 1 + columns.length }, makeDetails(i))));
  };
  return tableRow;
}

function drawTable() {
  const query = $("rows-filter").value.trim();
  let order = rows.map((_, i) => i).filter((i) => containsWords(rowTitle(rows[i]), query));
  const { sort } = state;
  if (sort) {
    const value = (i) => (sort.column < 0 ? rowTitle(rows[i]) : rows[i].cells[sort.column].value);
    const compare = (a, b) => (typeof a === "string" ? a.localeCompare(b) : a - b) * (sort.down ? -1 : 1);
    const known = order.filter((i) => value(i) !== null);
    order = [...known.sort((i, j) => compare(value(i), value(j))), ...order.filter((i) => value(i) === null)];
  }
  const grouped = !sort && rows.some((row) => row.group);
  const lines = order.flatMap((i, k) => {
    const { group } = rows[i];
    const starts = grouped && group && (k === 0 || rows[order[k - 1]].group !== group);
    const heading = starts ? [makeElement("tr", { className: "group" }, makeElement("th", { colSpan: 1 + columns.length, scope: "rowgroup", textContent: group }))] : [];
    return [...heading, makeRow(i, grouped)];
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
    const button = makeElement("button", { type: "button", textContent: column.title, title: column.about || "" });
    button.onclick = () => {
      const first = column.better === "higher"; // best first, then worst first, then as the table was written
      const now = state.sort;
      state.sort = now?.column !== k - 1 ? { column: k - 1, down: first } : now.down === first ? { column: k - 1, down: !first } : null;
      drawTable();
    };
    return makeElement("th", { scope: "col" }, button);
  });
  document.querySelector("thead").replaceChildren(makeElement("tr", {}, ...head));
}
