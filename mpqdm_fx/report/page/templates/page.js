"use strict";
// Shows the first rows of many layers, opens the row whose bar is clicked, sorts, copies the command.
const expand = (list) => {
  list.classList.remove("short");
  list.parentElement.querySelector(".more").hidden = true;
};
document.querySelectorAll(".layers").forEach((list) => {
  const more = list.parentElement.querySelector(".more");
  if (list.querySelectorAll("details").length <= 12) return;
  list.classList.add("short");
  more.hidden = false;
  more.addEventListener("click", () => expand(list));
});
document.querySelectorAll("[data-layer]").forEach((bar) => {
  bar.addEventListener("click", () => {
    const part = bar.closest("[data-part]");
    const row = part && document.getElementById(part.dataset.part + "-layer-" + bar.dataset.layer);
    if (row) {
      expand(row.parentElement);
      row.open = true;
      row.scrollIntoView({ block: "center", behavior: "smooth" });
      row.querySelector("summary").focus({ preventScroll: true });
    }
  });
});
document.querySelectorAll(".sort").forEach((bar) => {
  bar.hidden = false;
  const list = bar.parentElement.querySelector(".layers");
  bar.querySelectorAll("button").forEach((button) => {
    button.addEventListener("click", () => {
      const key = button.dataset.sort;
      const rows = [...list.querySelectorAll("details")];
      rows.sort((a, b) => Number(a.dataset[key]) - Number(b.dataset[key]) || a.dataset.index - b.dataset.index);
      rows.forEach((row) => list.append(row));
      bar.querySelectorAll("button").forEach((other) => other.setAttribute("aria-pressed", other === button));
    });
  });
});
document.querySelectorAll("[data-copy]").forEach((button) => {
  if (!navigator.clipboard) return;
  button.hidden = false;
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(document.getElementById(button.dataset.copy).textContent);
    button.textContent = "Copied";
  });
});
