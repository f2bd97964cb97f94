// From words to a box and back. Known phrases are answered here; others go to the kernel, where there is one.

const FOUND = "#f0a020", DRAWN = "#56b4e9";
const same = (a, b) => a.trim().toLowerCase() === b.trim().toLowerCase();

function overlap(a, b) { // intersection over union of two boxes (cx, cy, w, h)
  const side = (k) => Math.max(0, Math.min(a[k] + a[k + 2] / 2, b[k] + b[k + 2] / 2) - Math.max(a[k] - a[k + 2] / 2, b[k] - b[k + 2] / 2));
  const both = side(0) * side(1);
  return both / (a[2] * a[3] + b[2] * b[3] - both || 1);
}

function render({ model, el }) {
  const { root, body, status } = frame(el, "grounder",
    "Type a phrase (or click one) and see where the model finds it. Or drag a box over the image and read what fits it.");
  const known = model.get("phrases");
  const live = (name) => model.get(name) && !offline(model);
  let drag = null;

  const input = h("input", { type: "text", "aria-label": "phrase to look for", placeholder: known[0] ? `for example: ${known[0]}` : "for example: a red heart", autocomplete: "off" });
  const form = h("form", { class: "mvlp-form", onsubmit: (event) => { event.preventDefault(); ask(input.value); } },
    input, h("button", { class: "mvlp-button mvlp-main", type: "submit" }, "Find"));
  const chips = h("div", { class: "mvlp-chips", role: "group", "aria-label": "phrases to try" });
  const settle = roving(chips);
  chips.append(...known.map((phrase) => h("button", { class: "mvlp-word", "data-key": phrase, onclick: () => { input.value = phrase; ask(phrase); } }, phrase)));
  [...chips.children].forEach((chip) => { chip.tabIndex = -1; });
  settle();
  const list = h("ol", { class: "mvlp-bars" });
  const clear = h("button", { class: "mvlp-button", onclick: () => { input.value = ""; put(model, { answer: {}, drawn: [], found: {} }); } }, "Start again");
  const heading = h("h4", {});
  const view = picture(model.get("image"), "the image",
    "image: drag to draw a box; or arrow keys move a box, plus and minus change its size, Enter asks, Escape lets go");
  view.canvas.classList.add("mvlp-draw");
  body.append(view.node, h("div", { class: "mvlp-side" }, form, chips, heading, list, clear));

  const wait = patience(status);
  function ask(text) {
    const phrase = known.find((one) => same(one, text)) ?? text.trim();
    if (!phrase) return void (status.textContent = "Type a phrase first.");
    const answer = model.get("known")[phrase];
    if (answer) put(model, { answer: { phrase, box: answer.slice(0, 4), confidence: answer[4] ?? null } });
    else if (live("asks")) {
      wait.start(`Asking the model where “${phrase}” is …`);
      put(model, { question: { phrase, number: Date.now() } }); // the number makes a repeated question a new one
    } else status.textContent = `This page has no kernel, so it knows only the ${known.length} phrases above. “${phrase}” is not one of them.`;
  }
  function submit(box) {
    put(model, { drawn: box, found: {} });
    if (live("describes")) {
      wait.start("Asking the model what is in your box …");
      put(model, { question: { box, number: Date.now() } });
    } else if (!known.length) status.textContent = "This page has no kernel and no phrases to compare your box with.";
    else { // without a kernel: which of the known phrases does the model place here?
      const scored = known.map((phrase) => [phrase, overlap(box, model.get("known")[phrase])]);
      put(model, { found: { box, items: scored.sort((a, b) => b[1] - a[1]).slice(0, 6), by: "overlap with the model's box for the phrase" } });
    }
  }
  const between = ([x0, y0], [x1, y1]) => [(x0 + x1) / 2, (y0 + y1) / 2, Math.abs(x1 - x0), Math.abs(y1 - y0)];
  view.canvas.addEventListener("pointerdown", (event) => { drag = [view.at(event), view.at(event)]; view.canvas.setPointerCapture(event.pointerId); });
  view.canvas.addEventListener("pointermove", (event) => { if (drag) { drag[1] = view.at(event); paint(); } });
  view.canvas.addEventListener("pointercancel", () => { drag = null; paint(); });
  view.canvas.addEventListener("pointerup", () => {
    if (!drag) return;
    const box = between(...drag);
    drag = null;
    if (box[2] > 0.02 && box[3] > 0.02) submit(box);
    else { paint(); status.textContent = "That was a click: hold the button down and drag to draw a box."; }
  });
  view.canvas.addEventListener("keydown", (event) => {
    const move = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] }[event.key];
    const grow = { "+": 0.04, "=": 0.04, "-": -0.04 }[event.key];
    if (!move && !grow && !["Enter", "Escape"].includes(event.key)) return;
    event.preventDefault();
    if (event.key === "Escape") return void put(model, { drawn: [], found: {} });
    const fresh = model.get("drawn").length !== 4;
    let [cx, cy, w, hh] = fresh ? [0.5, 0.5, 0.3, 0.3] : model.get("drawn");
    if (event.key === "Enter") return submit([cx, cy, w, hh]);
    if (!fresh && move) [cx, cy] = [cx + 0.03 * move[0], cy + 0.03 * move[1]];
    if (!fresh && grow) [w, hh] = [w + grow, hh + grow];
    [w, hh] = [w, hh].map((x) => Math.max(0.04, Math.min(1, x)));
    const inside = (c, side) => Math.max(side / 2, Math.min(1 - side / 2, c));
    put(model, { drawn: [inside(cx, w), inside(cy, hh), w, hh], found: {} });
    status.textContent = `Box center ${percent(inside(cx, w))} from the left, ${percent(inside(cy, hh))} from the top, ${percent(w)} wide, ${percent(hh)} high. Enter asks what fits it.`;
  });

  function paint() {
    const answer = model.get("answer"), drawn = drag ? between(...drag) : model.get("drawn");
    view.paint((c, W, H) => {
      if (answer.box) drawBox(c, W, H, answer.box, FOUND, `${clip(answer.phrase, 34)}${answer.confidence == null ? "" : `  ${percent(answer.confidence)}`}`);
      if (drawn.length === 4) drawBox(c, W, H, drawn, DRAWN, drag ? "" : "your box", true);
    });
    root.dataset.answer = JSON.stringify(answer.box ?? []);
    root.dataset.drawn = JSON.stringify(drawn);
  }
  function bars() {
    const { items = [], by = "" } = model.get("found"), top = Math.max(...items.map(([, score]) => score), 1e-9);
    heading.textContent = items.length ? `What fits your box, best first${by ? ` (${by})` : ""}` : "Drag a box over the image: what fits it is listed here.";
    list.replaceChildren(...items.map(([text, score]) => h("li", { style: `--share:${Math.max(0, (100 * score) / top)}%` },
      h("span", {}, text), h("b", {}, score.toFixed(2)))));
  }
  function sayAnswer() {
    const { phrase, box, confidence, problem } = model.get("answer");
    for (const chip of chips.children) chip.setAttribute("aria-pressed", String(chip.dataset.key === phrase));
    if (!box && !problem) return void (status.textContent = "Nothing is asked yet.");
    wait.stop();
    if (problem) return void (status.textContent = problem);
    const side = (x, [low, high]) => (x < 0.37 ? low : x > 0.63 ? high : "middle");
    const where = `${side(box[1], ["top", "bottom"])} ${side(box[0], ["left", "right"])}`.replace("middle middle", "middle");
    status.textContent = `“${phrase}”: the model draws its box at the ${where}` +
      (confidence == null ? "." : ` and gives ${percent(confidence)} that ${model.get("meaning")}.`);
  }
  function sayFound() {
    const { items = [], problem } = model.get("found");
    if (items.length || problem) wait.stop();
    if (problem) status.textContent = problem;
    else if (items.length) status.textContent = `Your box fits “${items[0][0]}” best (${items[0][1].toFixed(2)}).`;
  }
  model.on("change:found", sayFound);
  const stop = [redraw(model, ["answer", "drawn"], paint), redraw(model, ["found"], bars), redraw(model, ["answer"], sayAnswer)];
  return () => { wait.stop(); model.off("change:found", sayFound); stop.forEach((end) => end()); };
}
export default { render };
