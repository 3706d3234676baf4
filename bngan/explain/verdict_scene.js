// What does the discriminator say of fakes that are changed together, jointly and separately?

const STAMP_SIDE = 14; // cells of two by two pixels
const STAMP_ADDS = 2; // from black to white
const BRIGHTNESS = numbersTo(17).map(i => -1 + i / 8);
const BATCHINGS = ["joint", "separate"];

/** Return an image (784) of what a stamp adds, from its cells as hexadecimal digits, four cells each. */
function stampImage(hex) {
  const cells = [...hex].flatMap(digit => [8, 4, 2, 1].map(bit => (parseInt(digit, 16) & bit ? 1 : 0)));
  return Float64Array.from({ length: IMAGE }, (_, i) => {
    const row = Math.floor(i / 28 / 2), column = Math.floor((i % 28) / 2);
    return STAMP_ADDS * (cells[row * STAMP_SIDE + column] ?? 0);
  });
}

function stampHex(cells) {
  return numbersTo(cells.length / 4).map(i => parseInt(cells.slice(4 * i, 4 * i + 4).join(""), 2).toString(16)).join("");
}

function stampCells(inside) {
  return numbersTo(STAMP_SIDE ** 2).map(i => Number(inside(Math.floor(i / STAMP_SIDE), i % STAMP_SIDE)));
}

const STAMPS = {
  none: () => false,
  frame: (row, column) => Math.min(row, column, 13 - row, 13 - column) === 0,
  seven: (row, column) => (row === 2 ? column > 3 && column < 11 : row > 2 && row < 12 && column === 11 - Math.floor(row / 2)),
};

/** What a trained and an untrained discriminator say of fakes that are changed as the scene's state says. */
class Verdicts {
  constructor(d, real, fakes) {
    this.networks = [d, untrained(d, 1)].map(network => {
      const first = new FirstLayer(network.linears[0], fakes), ofReal = linear(network.linears[0], real, BATCH);
      const plain = {};
      for (const batching of BATCHINGS) plain[batching] = discriminate(network, ofReal, first.pre, batching);
      return { network, first, ofReal, plain };
    });
    this.key = "";
    this.curveKey = "";
  }

  judge({ random, contrast, brightness, count, stamp }, batching) {
    const { network, first, ofReal, plain } = this.networks[random];
    const changed = first.changed({ contrast, brightness, count, stamp: /[^0]/.test(stamp) ? stampImage(stamp) : null });
    if (batching === "separate") return { real: plain.separate.real, fake: judge(network, changed, BATCH) };
    return discriminate(network, ofReal, changed, batching);
  }

  /** Return logits by batching, the changed fakes' mean logits, and how far these have moved. */
  look(state) {
    const means = { joint: 0, separate: 0 }, moved = { ...means }, logits = {};
    for (const batching of BATCHINGS) {
      logits[batching] = this.judge(state, batching);
      means[batching] = meanOfFirst(logits[batching].fake, state.count);
      moved[batching] = means[batching] - meanOfFirst(this.networks[state.random].plain[batching].fake, state.count);
    }
    return { logits, means, moved };
  }

  /**
   * Return what is seen now, and the changed fakes' mean logits by brightness, as many as can be worked out until the deadline.
   *
   * Of these there is one more at least each time, unless the first takes all of it.
   */
  upTo(state, deadline) {
    const key = JSON.stringify(state), curveKey = JSON.stringify({ ...state, brightness: 0 });
    if (this.curveKey !== curveKey) Object.assign(this, { curveKey, curve: [] });
    let isFree = this.key === key;
    if (!isFree) Object.assign(this, { key, now: this.look(state) });
    while (this.curve.length < BRIGHTNESS.length && (isFree || performance.now() < deadline)) {
      const brightness = BRIGHTNESS[this.curve.length];
      this.curve.push({ brightness, ...this.look({ ...state, brightness }).means });
      isFree = false;
    }
    return { ...this.now, curve: this.curve };
  }
}

function meanOfFirst(logits, count) {
  return average(logits.subarray(0, count));
}

function verdictScene(g, d, data) {
  const few = 16, fakes = generate(g, data.latents, BATCH, "batch").images;
  const verdicts = new Verdicts(d, data.real, fakes);
  const scene = new Scene("blind", (state, self, deadline) => {
    const { contrast, brightness, count, stamp } = state, added = stampImage(stamp);
    const { logits, means, moved, curve } = verdicts.upTo(state, deadline);
    if (curve.length < BRIGHTNESS.length) self.refresh();
    const changed = fakes.slice(0, few * IMAGE).map((value, i) =>
      i < count * IMAGE ? contrast * value + brightness + added[i % IMAGE] : value);
    showImages(self.part("fakes"), changed, 8, "16 of the 128 fakes, the first ones changed");
    showImages(self.part("stamp"), added.map(value => value - 1), 1, "the stamp; choose one of the buttons, or paint");
    for (const batching of BATCHINGS) {
      showStrip(self.part(`${batching}-strip`), logits[batching], count, batching);
      showCurve(self.part(`${batching}-curve`), curve, batching, brightness, means[batching]);
      const mean = `Changed fakes’ mean logit: ${say(means[batching])}`;
      self.write(`${batching}-says`, `${mean}, moved by ${say(moved[batching])}`);
    }
    const both = BATCHINGS.map(batching => `${batching}: moved by ${say(moved[batching])}`).join("; ");
    self.write("caption", `${count} of 128 fakes changed. Their mean logit, ${both}.`);
  });
  addStamps(scene);
  showImages(scene.part("reals"), data.real.subarray(0, few * IMAGE), 8, "16 of the 128 real digits");
  showImages(scene.part("by-joint"), generate(g, data.latents, 64, "running").images, 8, "64 digits of this page's generator");
  return scene;
}

/** Let the stamp be chosen by buttons, and painted. */
function addStamps(scene) {
  for (const [name, inside] of Object.entries(STAMPS)) {
    const button = scene.root.querySelector(`[data-stamp="${name}"]`);
    button.addEventListener("click", () => scene.set({ stamp: stampHex(stampCells(inside)) }));
  }
  const pad = scene.part("stamp");
  let to = 1;
  const paint = (event, first) => {
    const box = pad.getBoundingClientRect();
    const shares = [(event.clientY - box.top) / box.height, (event.clientX - box.left) / box.width];
    const [row, column] = shares.map(share => Math.floor(share * STAMP_SIDE));
    const image = stampImage(scene.state.stamp);
    const cells = stampCells((r, c) => image[2 * r * 28 + 2 * c] > 0);
    const cell = row * STAMP_SIDE + column;
    if (Math.min(row, column) < 0 || Math.max(row, column) >= STAMP_SIDE) return;
    if (first) to = 1 - cells[cell];
    cells[cell] = to;
    scene.set({ stamp: stampHex(cells) }, false);
  };
  pad.addEventListener("pointerdown", event => {
    pad.setPointerCapture(event.pointerId);
    paint(event, true);
  });
  pad.addEventListener("pointermove", event => pad.hasPointerCapture(event.pointerId) && paint(event, false));
  pad.addEventListener("pointerup", () => scene.settle());
}

/** Show logits of real images above those of fakes, with their means. */
function showStrip(host, logits, count, batching) {
  const jitter = uniform(1);
  const within = value => Math.min(Math.max(value, -9), 9);
  const row = (values, y, X) => [...values].map(value => [X(within(value)), y + 22 * (jitter() - 0.5)]);
  showPlot(host, {
    height: 132,
    x: { from: -9, to: 9, ticks: [-8, -4, 0, 4, 8], label: "logit: fake ← 0 → real" },
    words: `${batching}: mean logit of real images ${say(average(logits.real))}, of fakes ${say(average(logits.fake))}`,
    marks: X => {
      const fakes = row(logits.fake, 72, X);
      return mark.dots(row(logits.real, 28, X), "real", 2.4) +
        mark.triangles(fakes.slice(0, count), "fake", 3) + mark.triangles(fakes.slice(count), "fake hollow", 3) +
        mark.rule(X(within(average(logits.real))), 28) + mark.rule(X(within(average(logits.fake))), 72);
    },
  });
}

/** Show the changed fakes' mean logit by brightness, and where it is now. */
function showCurve(host, points, batching, brightness, mean) {
  const within = value => Math.min(Math.max(value, -4), 4);
  showPlot(host, {
    height: 170,
    x: { from: -1, to: 1, ticks: [-1, -0.5, 0, 0.5, 1], label: "brightness added" },
    y: { from: -4, to: 4, ticks: [-4, -2, 0, 2, 4], label: "mean logit" },
    words: `${batching}: mean logit of the changed fakes by brightness, now ${say(mean)}`,
    marks: (X, Y) => {
      const line = points.map(point => [X(point.brightness), Y(within(point[batching]))]);
      return (line.length ? mark.line(line, "fake-line") : "") + mark.triangles([[X(brightness), Y(within(mean))]], "fake", 6);
    },
  });
}
