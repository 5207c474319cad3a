"use strict";
// Tables of class `live` get a search field, a choice for each column marked data-filter, and headings that sort.
for (const table of document.querySelectorAll("table.live")) {
  const body = table.tBodies[0], rows = Array.from(body.rows), heads = Array.from(table.tHead.rows[0].cells);
  const text = cell => (cell.firstChild ? cell.firstChild.textContent : "").trim();
  const tools = document.createElement("div"), count = document.createElement("output"), tests = new Map();
  tools.className = "tools";
  const show = () => {
    let shown = 0;
    for (const row of rows) {
      row.hidden = !Array.from(tests.values()).every(test => test(row));
      shown += row.hidden ? 0 : 1;
    }
    count.textContent = `${shown} of ${rows.length} rows`;
  };
  const field = (name, element, event, test) => {
    const label = document.createElement("label");
    label.append(name, element);
    tools.append(label);
    element.addEventListener(event, () => { tests.set(element, test); show(); });
  };
  const search = document.createElement("input");
  search.type = "search";
  field("Search", search, "input", row => row.textContent.toLowerCase().includes(search.value.trim().toLowerCase()));
  heads.forEach((head, column) => {
    if (!("filter" in head.dataset)) return;
    const choice = document.createElement("select");
    for (const value of ["all", ...new Set(rows.map(row => text(row.cells[column])))]) choice.add(new Option(value, value));
    choice.options[0].value = "";
    field(head.textContent.trim(), choice, "change", row => !choice.value || text(row.cells[column]) === choice.value);
  });
  const number = cell => {
    const value = parseFloat(text(cell).replace(/\u2212/g, "-").replace("+", ""));
    return Number.isNaN(value) ? -Infinity : value;
  };
  const sort = (head, column) => {
    const numeric = head.classList.contains("number"), was = head.getAttribute("aria-sort");
    const down = was ? was === "ascending" : numeric;  // numbers start with the largest, words with A
    for (const other of heads) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const compare = numeric
      ? (a, b) => number(a.cells[column]) - number(b.cells[column])
      : (a, b) => text(a.cells[column]).localeCompare(text(b.cells[column]), "en", {numeric: true});
    body.append(...rows.sort((a, b) => (down ? -1 : 1) * compare(a, b)));
  };
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent.trim();
    button.addEventListener("click", () => sort(head, column));
    head.replaceChildren(button);
  });
  tools.append(count);
  table.closest(".scroll").before(tools);
  show();
}
