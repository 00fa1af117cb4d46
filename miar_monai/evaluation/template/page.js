"use strict";
for (const table of document.querySelectorAll("table")) {
  const heads = Array.from(table.tHead.rows[0].cells);
  const valueOf = ({ cells }, column) =>
    "value" in cells[column].dataset ? Number(cells[column].dataset.value) : cells[column].textContent;

  function compare(a, b, sign) {
    if (typeof a === "string") return sign * a.localeCompare(b, "en", { numeric: true });
    return Number.isNaN(a) - Number.isNaN(b) || sign * (a - b) || 0; // cells without a number are last either way
  }

  heads.forEach((head, column) => {
    const button = document.createElement("button"); // buttons have the focus and the keys that a reader expects
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const order = head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      const rows = Array.from(table.tBodies[0].rows);
      table.tBodies[0].append(...rows.sort((a, b) => compare(valueOf(a, column), valueOf(b, column), sign)));
    });
  });
}

const method = document.getElementById("method");
method.addEventListener("change", () => {
  for (const row of document.getElementById("patients").tBodies[0].rows) {
    row.hidden = method.value !== "" && row.dataset.method !== method.value;
  }
});
document.getElementById("filter").hidden = false;
document.body.dataset.state = "ready";
