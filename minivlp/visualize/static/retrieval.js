// Captions on one side, images on the other; choose one thing and the other side is ranked by similarity.

const SHOWN = 12;

function render({ model, el }) {
  const { root, body, status } = frame(el, "retrieval browser", model.get("asks") && !offline(model)
    ? "Click a caption to rank the images, click an image to rank the captions, or type your own words and press Enter. ✓ marks true pairs."
    : "Click a caption to rank the images, or an image to rank the captions; type to filter. ✓ marks true pairs.");
  const captions = model.get("captions"), owner = model.get("owner"), thumbs = model.get("thumbs");
  const scores = floats(model.get("similarity")); // (image, caption), row by row
  const live = model.get("asks") && !offline(model);

  const input = h("input", { type: "search", "aria-label": live ? "filter the captions, or type your own and press Enter" : "filter the captions",
    placeholder: live ? "type your own caption, Enter" : "type to filter the captions", autocomplete: "off",
    oninput: () => { if (model.get("image") >= 0) put(model, { image: -1 }); draw(); } }); // who types looks for captions again
  const form = h("form", { class: "mvlp-form", onsubmit: (event) => { event.preventDefault(); enter(input.value.trim()); } }, input,
    h("button", { class: "mvlp-button mvlp-main", type: "submit" }, "Search"),
    h("button", { class: "mvlp-button", type: "button", onclick: () => { input.value = ""; choose({}); } }, "Show all"));
  const texts = h("div", { class: "mvlp-captions", role: "group", "aria-label": "captions" });
  const grid = h("div", { class: "mvlp-images", role: "group", "aria-label": "images" });
  const [leftTitle, rightTitle] = [h("h4", {}), h("h4", {})];
  const [settleTexts, settleGrid] = [roving(texts), roving(grid)];
  body.append(form, h("div", { class: "mvlp-pane" }, leftTitle, texts), h("div", { class: "mvlp-pane" }, rightTitle, grid));

  const wait = patience(status);

  function enter(text) {
    if (!text) return void (status.textContent = "Type some words first.");
    const exact = captions.findIndex((c) => c.toLowerCase() === text.toLowerCase());
    const first = exact >= 0 ? exact : captions.findIndex((c) => matches(c, text));
    if (live && exact < 0) {
      put(model, { caption: -1, image: -1, question: { text, number: Date.now() } });
      wait.start(`Asking the model for “${text}” …`);
    } else if (first >= 0) { choose({ caption: first }); } else status.textContent = `No caption here holds all of these words: “${text}”. New words need a running kernel.`;
  }
  const matches = (caption, text) => text.toLowerCase().split(/\s+/).every((word) => caption.toLowerCase().includes(word));
  const choose = (what) => { wait.stop(); input.value = ""; put(model, { caption: -1, image: -1, answer: {}, ...what }); draw(); };

  // Items in order of score, best first, at most SHOWN; a true one further down is added at the end with its rank.
  function ranked(score, isTrue) {
    const order = score.map((_, i) => i).sort((a, b) => score[b] - score[a]).map((i, at) => ({ i, rank: at + 1, score: score[i], true: isTrue(i) }));
    return { total: order.length, best: order.find((o) => o.true), shown: order.filter((o, at) => at < SHOWN || (o.true && order.findIndex((p) => p.true) === at)) };
  }
  function draw() {
    const caption = model.get("caption"), image = model.get("image"), answer = model.get("answer");
    const n = captions.length, all = thumbs.map((_, i) => i);
    const row = caption >= 0 ? all.map((i) => scores[i * n + caption]) : answer.scores ?? null;
    const byText = row && image < 0 ? ranked(row, (i) => caption >= 0 && owner[caption] === i) : null;
    const byImage = image >= 0 ? ranked(captions.map((_, j) => scores[image * n + j]), (j) => owner[j] === image) : null;
    const typed = input.value.trim(), asked = typed === answer.text; // words that were asked filter no longer
    const plain = captions.map((_, i) => ({ i })).filter(({ i }) => asked || matches(captions[i], typed));

    const bar = (o, list) => { // length of the bar: between the worst and the best that is shown
      const [low, high] = [Math.min(...list.map((p) => p.score)), Math.max(...list.map((p) => p.score))];
      return `--share:${Math.round(8 + (92 * (o.score - low)) / (high - low || 1))}%`;
    };
    const left = byImage ? byImage.shown : plain;
    refill(texts, left.map((o) => h("button", { class: `mvlp-caption${o.true ? " mvlp-true" : ""}`, "data-key": o.i, style: o.rank ? bar(o, left) : false,
      "aria-pressed": String(caption === o.i), "aria-label": o.rank ? `rank ${o.rank}${o.true ? ", true pair" : ""}: ${captions[o.i]}` : captions[o.i],
      onclick: () => choose({ caption: o.i }) },
      ...(o.rank ? [h("b", {}, `${o.rank}`)] : []), h("span", {}, captions[o.i]), ...(o.rank ? [h("em", {}, `${o.true ? "✓ " : ""}${o.score.toFixed(2)}`)] : []))), settleTexts);
    const right = byText ? byText.shown : all.map((i) => ({ i }));
    refill(grid, right.map((o) => h("button", { class: `mvlp-image${o.true ? " mvlp-true" : ""}`, "data-key": o.i, "aria-pressed": String(image === o.i),
      "aria-label": `${o.rank ? `rank ${o.rank}${o.true ? ", true pair" : ""}: ` : ""}image of “${captions[owner.indexOf(o.i)] ?? o.i}”`,
      onclick: () => choose({ image: o.i }) },
      h("img", { src: thumbs[o.i], alt: "" }), ...(o.rank ? [h("span", {}, h("b", {}, `${o.rank}`), ` ${o.score.toFixed(2)}${o.true ? " ✓" : ""}`)] : []))), settleGrid);

    leftTitle.textContent = byImage ? `Captions for the chosen image, best first, with their similarity (${byImage.shown.length} of ${n})` : plain.length ? `Captions (${plain.length} of ${n})` : `No caption holds all of these words${live ? "; Enter asks the model" : ""}`;
    rightTitle.textContent = byText ? `Images for the words, best first, with their similarity (${byText.shown.length} of ${all.length})` : `Images (${all.length})`;
    status.textContent = byText?.best ? `“${captions[caption]}”: the true image is at rank ${byText.best.rank} of ${byText.total}.`
      : byText ? `“${answer.text}”: words of your own, so no image is marked as the true one.`
      : byImage ? `For this image the first of its true captions, “${captions[byImage.best?.i] ?? "?"}”, is at rank ${byImage.best?.rank ?? "?"} of ${byImage.total}.`
      : `${all.length} images, ${n} captions. Nothing is chosen.`;
    Object.assign(root.dataset, { caption, image, first: byText ? byText.shown[0].i : byImage ? byImage.shown[0].i : -1 });
  }
  const answered = () => {
    wait.stop();
    draw();
    if (model.get("answer").problem) status.textContent = model.get("answer").problem;
  };
  const stop = [redraw(model, ["caption", "image"], draw), redraw(model, ["answer"], answered)];
  return () => { wait.stop(); stop.forEach((end) => end()); };
}
export default { render };
