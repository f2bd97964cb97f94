// Shows a page as slides: cells tagged `slide` begin one. Arrow keys, space, Page Up/Down, or a click on the margins.
const cells = [...document.querySelectorAll(".jp-Cell")];
const slides = [];
for (const cell of cells) {
  const opens = cell.querySelector(".celltag_slide") || cell.classList.contains("celltag_slide");
  if (opens || slides.length === 0) slides.push([]);
  slides.at(-1).push(cell);
}
const style = document.createElement("style");
style.textContent = `
  body { zoom: 1.35; }
  .off-slide { display: none !important; }
  #slide-number { position: fixed; right: 1rem; bottom: .5rem; opacity: .6; font: 12px sans-serif; color: var(--jp-content-font-color1); }
`;
document.head.append(style);
const number = document.body.appendChild(document.createElement("div"));
number.id = "slide-number";

let at = 0;
function show(which) {
  at = Math.min(Math.max(which, 0), slides.length - 1);
  slides.forEach((group, index) => group.forEach((cell) => cell.classList.toggle("off-slide", index !== at)));
  number.textContent = `${at + 1} / ${slides.length}`;
  history.replaceState(null, "", `#${at + 1}`);
  scrollTo(0, 0);
}
const steps = { ArrowRight: 1, PageDown: 1, " ": 1, ArrowLeft: -1, PageUp: -1, Home: -Infinity, End: Infinity };
addEventListener("keydown", (event) => {
  // keys that a widget or a text field uses are its own
  if (event.key in steps && !event.target.closest(".live-widget, input, textarea")) {
    event.preventDefault();
    show(at + steps[event.key]);
  }
});
addEventListener("click", (event) => {
  if (event.target === document.body || event.target === document.documentElement) show(at + (event.clientX * 2 > innerWidth ? 1 : -1));
});
show((Number.parseInt(location.hash.slice(1)) || 1) - 1);
