// What a filter keeps: each picture with the caption that stood beside it and the one that was written for it. Scores
// came with the widget; the verdicts follow from them and the threshold, so every answer is computed here, at once.

const VERDICTS = [
  ["", "any"], ["01", "only the new one kept"], ["10", "only the old one kept"], ["11", "both kept"], ["00", "both thrown out"],
  ["kept", "kept"], ["out", "thrown out"], ["mistake", "a mistake"],
];
const ORDERS = [
  ["", "as in the data"], ["web", "old caption, lowest score first"], ["synthetic", "new caption, lowest score first"],
  ["gain", "new caption better than the old"], ["mistake", "worst mistakes first"],
];

// A labelled menu bound to one value of the model.
function menu(model, name, label, options) {
  const select = h("select", { "aria-label": label, onchange: () => put(model, { [name]: select.value }) },
    ...options.map(([value, text]) => h("option", { value }, text)));
  return { node: h("label", { class: "mvlp-menu" }, h("span", {}, label), select), draw: () => { select.value = model.get(name); } };
}

function render({ model, el }) {
  const { root, body, status } = frame(el, "filter board",
    "Move the threshold and see which captions are kept. Sort the pictures, or show only some. ⚠ marks a verdict that is a mistake.");
  const rows = model.get("rows"), thumbs = model.get("thumbs"), kinds = model.get("kinds");
  const lines = (row) => [row.web, row.synthetic].filter(Boolean);
  const two = rows.some((row) => row.synthetic), known = rows.some((row) => lines(row).some((line) => line.holds != null));
  const kept = (line) => line.caption !== "" && line.score >= model.get("threshold");
  const mistaken = (line) => line.holds != null && line.holds !== kept(line);
  // How far a score lies on the wrong side of the threshold; below zero on the right side.
  const beside = (line) => (line.holds == null ? -Infinity : (line.holds ? -1 : 1) * (line.score - model.get("threshold")));

  const all = rows.flatMap((row) => lines(row).map((line) => line.score));
  const threshold = slider(model, "threshold", "Keep from", [Math.min(0, ...all), Math.max(1, ...all), 0.01], (x) => `score ${x.toFixed(2)}`);
  const verdicts = VERDICTS.filter(([value]) => (value.length === 2 ? two : ["kept", "out"].includes(value) ? !two : known || value !== "mistake"));
  const menus = [menu(model, "verdict", "Verdict", verdicts),
    menu(model, "order", "Order", ORDERS.filter(([value]) => (value === "mistake" ? known : two || !["synthetic", "gain"].includes(value))))];
  if (kinds.length) menus.unshift(menu(model, "kind", "Old caption", [["", "any"], ...kinds.map((kind) => [kind, kind])]));
  const reset = h("button", { class: "mvlp-button", type: "button",
    onclick: () => put(model, { threshold: model.get("first"), kind: "", verdict: "", order: "" }) }, "Start again");

  const cells = h("tbody");
  const heads = ["Picture", "Old caption, from the web", ...(two ? ["New caption, written by the model"] : [])];
  const table = h("table", {}, h("thead", {}, h("tr", {}, ...heads.map((text) => h("th", { scope: "col" }, text)))), cells);
  const box = h("div", { class: "mvlp-board", role: "region", tabindex: "0", "aria-label": "pictures and their captions; arrow keys scroll" }, table);
  body.append(h("div", { class: "mvlp-row" }, threshold.node, reset), h("div", { class: "mvlp-row" }, ...menus.map((m) => m.node)), box);

  function cell(line) {
    if (!line) return h("td", {});
    const keep = kept(line), share = Math.round(100 * Math.max(0, Math.min(1, line.score)));
    return h("td", { "data-kept": String(keep), "data-mistake": String(mistaken(line)) },
      h("p", { class: "mvlp-said" }, line.caption || "(nothing)"),
      h("p", { class: `mvlp-verdict mvlp-${keep ? "keep" : "drop"}`, style: `--share:${share}%` }, h("b", {}, `${keep ? "✓ kept" : "✗ thrown out"}`), h("span", {}, line.score.toFixed(2))),
      ...(line.truth || line.more ? [h("p", { class: "mvlp-truth" },
        [line.truth && `truth: ${line.truth}`, mistaken(line) && `⚠ ${keep ? "should go" : "should stay"}`, line.more && `${line.more} more wordings`].filter(Boolean).join(" · "))] : []));
  }
  function shown(row) {
    const verdict = model.get("verdict"), [old, fresh] = [kept(row.web), row.synthetic ? kept(row.synthetic) : false];
    if (model.get("kind") && row.web.truth !== model.get("kind")) return false;
    if (verdict === "mistake") return lines(row).some(mistaken);
    if (verdict === "kept" || verdict === "out") return old === (verdict === "kept");
    return !verdict || verdict === `${+old}${+fresh}`;
  }
  const key = { // by what the rows are ordered, smallest first
    "": () => 0, web: (row) => row.web.score, synthetic: (row) => row.synthetic?.score ?? Infinity,
    gain: (row) => row.web.score - (row.synthetic?.score ?? -Infinity), mistake: (row) => -Math.max(...lines(row).map(beside)),
  };
  function tally(name, word) {
    const some = rows.map((row) => row[name]).filter(Boolean), stay = some.filter(kept), truths = some.filter((line) => line.holds != null);
    if (!some.length) return "";
    let text = `${stay.length} of ${some.length} ${word} captions are kept`;
    const right = truths.filter((line) => line.holds), good = right.filter(kept), judged = truths.filter(kept);
    if (judged.length) text += `; ${percent(good.length / judged.length)} of those are true`;
    if (right.length) text += `, and ${percent(good.length / right.length)} of all true ones are kept`;
    return `${text}. `;
  }
  function draw() {
    threshold.draw();
    menus.forEach((m) => m.draw());
    const some = rows.map((row, i) => ({ row, i })).filter(({ row }) => shown(row));
    const by = key[model.get("order")] ?? key[""];
    some.sort((a, b) => by(a.row) - by(b.row) || a.i - b.i); // Infinity - Infinity is not a number: then as in the data
    cells.replaceChildren(...some.map(({ row, i }) => h("tr", { "data-key": i },
      h("td", {}, h("img", { src: thumbs[i], alt: `picture ${i + 1}` })), cell(row.web), ...(two ? [cell(row.synthetic)] : []))));
    box.scrollTop = 0;
    status.textContent = `${tally("web", "old")}${tally("synthetic", "new")}${some.length === rows.length ? "All" : `${some.length} of`} ${rows.length} pictures are shown.`;
    Object.assign(root.dataset, { shown: some.length, first: some[0]?.i ?? -1 });
  }
  return redraw(model, ["threshold", "kind", "verdict", "order"], draw);
}
export default { render };
