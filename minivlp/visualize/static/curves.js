// Training curves. Python sends a few hundred points per curve, as a list of [name, steps, values]; null is a gap.

const WIDE = 640, HIGH = 270, PAD = { left: 58, right: 14, top: 12, bottom: 34 };
const DASHES = ["", "7 4", "2 3", "9 3 2 3", "4 2"];

const svg = (tag, attributes, text = "") => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.textContent = text;
  return node;
};

function ticks(low, high, count) { // round numbers: 1, 2 or 5 times a power of ten
  const rough = (high - low) / count || 1, unit = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * unit).find((s) => s >= rough);
  return Array.from({ length: Math.floor(high / step) - Math.ceil(low / step) + 1 }, (_, i) => (Math.ceil(low / step) + i) * step);
}
const decades = (low, high) => {
  const marks = [1, 2, 5].flatMap((m) => Array.from({ length: 24 }, (_, i) => m * 10 ** (i - 12)));
  return marks.sort((a, b) => a - b).filter((x) => x >= low * 0.999 && x <= high * 1.001);
};
const number = (x) => (x == null ? "not a number" : Math.abs(x) >= 1000 || (x !== 0 && Math.abs(x) < 0.001) ? x.toExponential(1) : String(Number(x.toPrecision(3))));

const ink = (i) => `var(--mv-line${i % 5})`;
function swatch(i) { // color and dashes both tell the curves apart
  const line = svg("line", { x1: 0, x2: 26, y1: 5, y2: 5, class: "mvlp-line", style: `stroke: ${ink(i)}`, "stroke-dasharray": DASHES[i % 5] });
  const node = svg("svg", { width: 26, height: 10, "aria-hidden": "true" });
  node.append(line);
  return node;
}

function smoothed(steps, values, window) { // mean of what lies within half a window on either side; gaps stay gaps
  return values.map((y, k) => {
    if (y == null) return null;
    const near = values.filter((z, m) => z != null && Math.abs(steps[m] - steps[k]) <= window / 2);
    return near.reduce((a, b) => a + b, 0) / near.length;
  });
}

const seriesOf = (model) => Object.fromEntries(model.get("series").map(([name, ...points]) => [name, points]));

function render({ model, el }) {
  const { root, body, status } = frame(el, "training curves", offline(model) ? "How training went. Point at the chart to read values."
    : "Grows while the training cell runs. To stop early press ■ (interrupt the kernel) in the toolbar: the history is kept. Point at the chart to read values.");
  const chart = svg("svg", { viewBox: `0 0 ${WIDE} ${HIGH}`, role: "img", class: "mvlp-chart" });
  const legend = h("div", { class: "mvlp-legend", role: "group", "aria-label": "curves: click to hide or show" });
  const settle = roving(legend);
  const log = h("input", { type: "checkbox", onchange: () => put(model, { log_axis: log.checked }) });
  const soft = slider(model, "smooth", "Smooth", [0, 0.2, 0.01], (x) => (x ? `${Math.round(100 * x)} % of the run` : "off"));
  body.append(legend, chart, h("div", { class: "mvlp-row" }, h("label", { class: "mvlp-check" }, log, "log axis"), soft.node));
  const hidden = new Set();
  let pointed = null, toX = null, tail = "";

  function draw() {
    const series = seriesOf(model), all = Object.keys(series), names = all.filter((n) => !hidden.has(n));
    log.checked = model.get("log_axis");
    soft.draw();
    root.dataset.steps = Math.max(0, ...all.map((n) => series[n][0].at(-1) ?? 0));
    refill(legend, all.map((n, i) => h("button", { class: "mvlp-word", "data-key": n, "aria-pressed": String(!hidden.has(n)), 
      onclick: () => { hidden.has(n) ? hidden.delete(n) : hidden.add(n); draw(); } }, swatch(i), n)), settle);
    chart.replaceChildren();
    const isLog = model.get("log_axis"), usable = (y) => y != null && (!isLog || y > 0);
    const ys = names.flatMap((n) => series[n][1]).filter(usable), xs = all.flatMap((n) => series[n][0]);
    if (!ys.length) {
      chart.append(svg("text", { x: WIDE / 2, y: HIGH / 2, class: "mvlp-mark", "text-anchor": "middle" }, all.length ? "nothing to show on this axis" : "waiting for the first step …"));
      toX = null;
      return say();
    }
    let [low, high] = [Math.min(...ys), Math.max(...ys)];
    if (high === low) [low, high] = isLog ? [low / 2, high * 2] : [low - 0.5, high + 0.5];
    const [first, last] = [Math.min(...xs) < 0.1 * Math.max(...xs) ? 0 : Math.min(...xs), Math.max(...xs, Math.min(...xs) + 1)], scale = isLog ? Math.log : (x) => x;
    toX = (x) => PAD.left + ((x - first) / (last - first)) * (WIDE - PAD.left - PAD.right);
    const toY = (y) => HIGH - PAD.bottom - ((scale(y) - scale(low)) / (scale(high) - scale(low))) * (HIGH - PAD.top - PAD.bottom);
    let marks = isLog ? decades(low, high) : ticks(low, high, 6);
    if (isLog && marks.length > 7) marks = marks.filter((y) => Math.abs(Math.log10(y) - Math.round(Math.log10(y))) < 1e-6);
    if (marks.length < 2) marks = [low, high];
    for (const y of marks) chart.append(svg("line", { x1: PAD.left, x2: WIDE - PAD.right, y1: toY(y), y2: toY(y), class: "mvlp-grid" }),
      svg("text", { x: PAD.left - 7, y: toY(y) + 4, class: "mvlp-mark", "text-anchor": "end" }, number(y)));
    for (const x of ticks(first, last, 6)) chart.append(svg("text", { x: toX(x), y: HIGH - PAD.bottom + 17, class: "mvlp-mark", "text-anchor": "middle" }, String(Math.round(x * 100) / 100)));
    chart.append(svg("text", { x: (PAD.left + WIDE - PAD.right) / 2, y: HIGH - 3, class: "mvlp-mark", "text-anchor": "middle" }, "step"));
    for (const n of names) {
      const [steps, values] = series[n], i = all.indexOf(n), window = model.get("smooth") * (last - first);
      const path = (line) => line.reduce(([d, pen], y, k) => (usable(y) ? [`${d}${pen}${toX(steps[k]).toFixed(1)} ${toY(y).toFixed(1)}`, "L"] : [d, "M"]), ["", "M"])[0];
      const line = (ys, extra) => chart.append(svg("path", { d: path(ys), class: "mvlp-line", style: `stroke: ${ink(i)}`, "stroke-dasharray": DASHES[i % 5], ...extra }));
      if (window) line(values, { opacity: 0.25 });
      line(window ? smoothed(steps, values, window) : values, {});
      const gap = values.findIndex((y) => y == null);
      if (gap >= 0) chart.append(svg("text", { x: Math.min(toX(steps[gap]), WIDE - 70), y: PAD.top + 12 + 14 * i, class: "mvlp-mark", style: `fill: ${ink(i)}` }, `✕ ${n}: not a number`));
      if (values.filter(usable).length === 1) chart.append(svg("circle", { cx: toX(steps[values.findIndex(usable)]), cy: toY(values.find(usable)), r: 3.5, style: `fill: ${ink(i)}` }));
    }
    if (pointed != null) chart.append(svg("line", { x1: toX(pointed), x2: toX(pointed), y1: PAD.top, y2: HIGH - PAD.bottom, class: "mvlp-cross" }));
    say();
  }
  function say() {
    const series = seriesOf(model), names = Object.keys(series).filter((n) => !hidden.has(n));
    const at = (n) => { // the value logged nearest to where one points, else the last one
      const [steps, values] = series[n];
      if (pointed == null) return values.at(-1);
      return values[steps.reduce((best, x, i) => (Math.abs(x - pointed) < Math.abs(steps[best] - pointed) ? i : best), 0)];
    };
    const step = pointed ?? root.dataset.steps;
    tail = names.length ? `Step ${step}: ${names.map((n) => `${n} ${number(at(n))}`).join(", ")}.` : "No step is logged yet.";
    const note = { running: " Running.", stopped: " Stopped by you; the history is kept.", done: "" }[model.get("state")] ?? "";
    status.setAttribute("aria-live", model.get("state") === "running" ? "off" : "polite"); // do not read out every step
    status.textContent = tail + note;
    chart.setAttribute("aria-label", `training curves. ${tail}`);
  }
  chart.addEventListener("pointermove", (event) => {
    if (!toX) return;
    const box = chart.getBoundingClientRect(), x = ((event.clientX - box.left) / box.width) * WIDE;
    const steps = [...new Set(Object.values(seriesOf(model)).flatMap(([steps]) => steps))];
    pointed = steps.reduce((best, s) => (Math.abs(toX(s) - x) < Math.abs(toX(best) - x) ? s : best), steps[0]);
    draw();
  });
  chart.addEventListener("pointerleave", () => { pointed = null; draw(); });
  return redraw(model, ["series", "log_axis", "smooth", "state"], draw);
}
export default { render };
