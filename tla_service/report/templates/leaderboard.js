"use strict";
const board = document.getElementById("board"), body = board.tBodies[0], rows = [...body.rows];
const form = document.getElementById("controls"), count = document.getElementById("count"), sort = document.getElementById("sort");
const highFirst = new Set(["clean", "autoattack", "worst", "detection", "registered"]);
const valueOf = (row, key) => row.querySelector(`[data-key="${key}"]`)?.dataset.value ?? "";

// Rows without a value stay last in both directions; equals keep the order that the page came with.
function compare(key, sign) {
  return (one, two) => {
    const [a, b] = [valueOf(one, key), valueOf(two, key)];
    if (a === "" || b === "") return (a === "") - (b === "");
    const numbers = !isNaN(a) && !isNaN(b);
    return sign * (numbers ? a - b : a.localeCompare(b, "en"));
  };
}

function order(key, direction) {
  body.append(...[...rows].sort(compare(key, direction === "ascending" ? 1 : -1)));
  for (const head of board.tHead.querySelectorAll("th[data-key]")) {
    if (head.dataset.key === key) head.setAttribute("aria-sort", direction);
    else head.removeAttribute("aria-sort");
  }
  sort.value = key;
}

function filter() {
  for (const row of rows) {
    row.hidden = ![...form.querySelectorAll("[data-filter]")].every((field) => {
      const wanted = field.type === "checkbox" ? (field.checked ? field.value : "") : field.value;
      if (field.dataset.filter === "text") return row.textContent.toLowerCase().includes(wanted.trim().toLowerCase());
      return wanted === "" || row.dataset[field.dataset.filter] === wanted;
    });
  }
  count.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} rows`;
}

for (const head of board.tHead.querySelectorAll("th[data-key]")) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = head.textContent;
  head.replaceChildren(button);
  button.addEventListener("click", () => {
    const first = highFirst.has(head.dataset.key) ? "descending" : "ascending";
    const other = first === "descending" ? "ascending" : "descending";
    order(head.dataset.key, head.getAttribute("aria-sort") === first ? other : first);
  });
}
form.addEventListener("input", (event) => {
  if (event.target === sort) order(sort.value, highFirst.has(sort.value) ? "descending" : "ascending");
  else filter();
});
form.addEventListener("submit", (event) => event.preventDefault());
form.hidden = count.hidden = false;
filter();
