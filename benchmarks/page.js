// A click on a heading sorts the table by that column: numbers by `data-value`, anything else as text. Cells without a
// value stay last in both directions.
function sortRows(table, column, ascending) {
  const value = (row) => row.cells[column].dataset.value ?? "";
  const compare = (left, right) => {
    const [a, b] = [value(left), value(right)];
    if (a === "" || b === "") return (a === "") - (b === "");
    const numbers = [Number(a), Number(b)];
    const order = numbers.some(Number.isNaN) ? a.localeCompare(b, "en", { numeric: true }) : numbers[0] - numbers[1];
    return ascending ? order : -order;
  };
  table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
}

for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const heading = button.parentElement;
    const ascending = heading.getAttribute("aria-sort") !== "ascending";
    for (const other of heading.parentElement.cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    sortRows(heading.closest("table"), heading.cellIndex, ascending);
  });
}
