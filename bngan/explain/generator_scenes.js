// What do the scenes about the generator show, and what do they say of it?
//
// Each is made of the generator g and of the page's data: latents (128, 100); ten, those that are shown first (10, 100), and
// tenAlone, their images by running statistics (10, 784).

const BATCH = 128;
const SHOWN = 10;
const MATES = 1000; // seeds of mates begin there, apart from those of the batches that running statistics are fed with
const FED = 5000;

/** Return one row of values (n, width). */
function rowOf(values, number, width) {
  return values.subarray(number * width, (number + 1) * width);
}

function numbersTo(n) {
  return Array.from({ length: n }, (_, i) => i);
}

/** Return all scenes about the generator. */
function generatorScenes(g, page) {
  const ten = join(page.ten.map(number => rowOf(page.latents, number, LATENT)));
  const data = { ...page, ten, tenAlone: generate(g, ten, SHOWN, "running").images };
  for (const host of document.querySelectorAll("[data-chooser]")) {
    addChooser(host, host.dataset.chooser, data.tenAlone, i => `the latent that is drawn as ${i} by running statistics`);
  }
  const makers = [changeScene, originScene, channelScene, matesScene, momentumScene, eraseScene, foldScene];
  return makers.map(make => make(g, data));
}

/** Return the latents of a batch: one of the ten, and mates that depend on the seed alone. */
function withMates(data, number, seed, size) {
  return join([rowOf(data.ten, number, LATENT), randomLatents(MATES + seed, size - 1)]);
}

// 0: the same latent among other mates ------------------------------------------------------------------------------------

function changeScene(g, data) {
  const size = 8, kept = 6;
  return new Scene("change", ({ digit, draw }, scene) => {
    const seeds = numbersTo(kept).map(later => draw - kept + 1 + later);
    const batches = seeds.map(seed => withMates(data, digit, seed, size));
    const images = batches.map(batch => generate(g, batch, size, "batch").images);
    const heroes = images.map(drawn => rowOf(drawn, 0, IMAGE)), latents = batches.map(batch => rowOf(batch, 0, LATENT));
    showImages(scene.part("hero"), heroes.at(-1), 1, "your digit in this batch");
    showImages(scene.part("mates"), images.at(-1).subarray(IMAGE), size - 1, "the seven others in its batch");
    showImages(scene.part("before"), join(heroes), kept, "the same latent in the last batches");
    showBars(scene.part("latent"), latents.at(-1), "its 100 numbers");
    const changed = largestDifference(latents.at(-1), latents.at(-2)), moved = distance(heroes.at(-1), heroes.at(-2));
    const since = `its 100 numbers have changed by ${changed}, and its picture by ${say(moved)}`;
    scene.write("caption", `Batch ${draw}. Since the batch before, ${since}.`);
  });
}

// 1: latents on a map ------------------------------------------------------------------------------------------------------

const MAP_SIDE = 7;

function originScene(g, data) {
  const [first, second, third, fourth] = [0, 3, 7, 6].map(digit => rowOf(data.ten, digit, LATENT));
  const place = (across, down) => slerp(slerp(first, second, across), slerp(third, fourth, across), down);
  const last = MAP_SIDE - 1;
  const places = numbersTo(MAP_SIDE ** 2).map(i => place((i % MAP_SIDE) / last, Math.floor(i / MAP_SIDE) / last));
  const scene = new Scene("origin", ({ across, down }) => {
    const z = place(across, down);
    const [{ hidden, images }, again] = [generate(g, z, 1, "running"), generate(g, z, 1, "running")];
    showImages(scene.part("digit"), images, 1, "the digit at this place");
    showBars(scene.part("latent"), z, "the latent's 100 numbers");
    showBars(scene.part("first"), hidden[0], "128 values of the first layer");
    showBars(scene.part("second"), hidden[1], "256 values of the second layer");
    scene.part("place").style.left = `${(100 * (last * across + 0.5)) / MAP_SIDE}%`;
    scene.part("place").style.top = `${(100 * (last * down + 0.5)) / MAP_SIDE}%`;
    const twice = `drawn twice, with a largest difference of ${largestDifference(images, again.images)}`;
    scene.write("caption", `The latent ${say(100 * across, 0)}% across and ${say(100 * down, 0)}% down, ${twice}.`);
  });
  const map = generate(g, join(places), places.length, "running").images;
  showImages(scene.part("map"), map, MAP_SIDE, "digits between four latents");
  addPad(scene);
  return scene;
}

/** Let a pointer move over the map. */
function addPad(scene) {
  const pad = scene.part("pad");
  const move = (event, settled) => {
    const box = pad.getBoundingClientRect();
    const share = (value, size) => Math.min(Math.max(((value / size) * MAP_SIDE - 0.5) / (MAP_SIDE - 1), 0), 1).toFixed(2);
    const [across, down] = [share(event.clientX - box.left, box.width), share(event.clientY - box.top, box.height)];
    scene.set({ across, down }, settled);
  };
  pad.addEventListener("pointerdown", event => {
    pad.setPointerCapture(event.pointerId);
    move(event, false);
  });
  pad.addEventListener("pointermove", event => pad.hasPointerCapture(event.pointerId) && move(event, false));
  pad.addEventListener("pointerup", event => move(event, true));
}

// 2: one channel of the second layer ---------------------------------------------------------------------------------------

function channelScene(g, data) {
  const norm = g.norms[1], width = norm.gamma.length;
  const latents = join([data.ten, data.latents.subarray(0, (BATCH - SHOWN) * LATENT)]); // the ten first, since these are drawn
  const trained = generate(g, latents, BATCH, "batch", SHOWN);
  const channelOf = (values, channel) => values.filter((_, i) => i % width === channel);
  const strongest = strongestChannels(trained.hidden[1], g.linears[2].weight, channelOf, width);
  const strokes = join(strongest.map(channel => channelOf(g.linears[2].weight, channel))).map(value => 2.5 * value);
  const chooser = document.querySelector('[data-part="channels"]');
  addChooser(chooser, "channel.choice", strokes, i => `channel ${strongest[i]}`, signed);

  return new Scene("channel", ({ choice, gamma, beta }, scene) => {
    const channel = strongest[choice], ownGamma = gamma * norm.gamma[channel], ownBeta = norm.beta[channel] + beta;
    const z = channelOf(trained.pre[1], channel), statistics = batchStatistics(z, BATCH);
    const hat = normalize(z, statistics, norm.eps), y = hat.map(value => ownGamma * value + ownBeta);
    const hidden = trained.hidden[1].slice(0, SHOWN * width); // in which nothing else has changed
    for (let row = 0; row < SHOWN; row++) hidden[row * width + channel] = Math.max(y[row], 0);
    const images = linear(g.linears[2], hidden, SHOWN).map(Math.tanh);
    showImages(scene.part("before"), trained.images, 5, "ten digits with gamma and beta as trained");
    showImages(scene.part("now"), images, 5, "the same digits with gamma and beta as they are set");
    showImages(scene.part("change"), images.map((value, i) => value - trained.images[i]), 5, "the difference", signed);
    showHistograms(scene.part("histograms"), [["z, as it comes", z], ["ẑ, normalized", hat], ["y = γẑ + β", y]]);
    writeEquation(scene, statistics.mean[0], statistics.variance[0], ownGamma, ownBeta);
    const used = y.filter(value => value > 0).length, moved = say(distance(images, trained.images));
    const about = `the mean of y is ${say(average(y))}, that is β, and ${used} of ${BATCH} digits use it (y > 0)`;
    scene.write("caption", `Channel ${channel}: ${about}. The ten digits have moved by ${moved}.`);
  });
}

/** Return the 16 channels that most change the images: by their mean value times the length of their weights. */
function strongestChannels(hidden, weight, channelOf, width) {
  const channels = numbersTo(width);
  const strength = channels.map(channel => average(channelOf(hidden, channel)) * Math.hypot(...channelOf(weight, channel)));
  return channels.sort((a, b) => strength[b] - strength[a]).slice(0, 16);
}

function writeEquation(scene, mean, variance, gamma, beta) {
  for (const [name, value] of Object.entries({ mean, variance, gamma, beta })) {
    for (const place of scene.root.querySelectorAll(`[data-is="${name}"]`)) {
      place.textContent = value < 0 ? `(${say(value)})` : say(value);
    }
  }
}

/** Show how values of a batch are spread, one histogram under the other on one axis. */
function showHistograms(host, rows) {
  const bins = 60, from = -12, to = 12, rowHeight = 100, perImage = 2.4;
  const within = value => Math.min(Math.max(value, from), to);
  const counts = values => {
    const found = new Float64Array(bins);
    for (const value of values) found[Math.min(Math.floor(((within(value) - from) / (to - from)) * bins), bins - 1)] += 1;
    return [...found];
  };
  showPlot(host, {
    height: rows.length * rowHeight + 46,
    x: { from, to, ticks: [-12, -8, -4, 0, 4, 8, 12], label: "value; the triangles are the first digit" },
    words: rows.map(([name, values]) => `${name}: mean ${say(average(values))}`).join("; "),
    marks: X => rows.map(([name, values], row) => {
      const base = 10 + (row + 1) * rowHeight, width = (X(to) - X(from)) / bins;
      const bars = counts(values).map((count, bin) => {
        const height = Math.min(perImage * count, rowHeight - 18), isCut = row === 2 && bin < bins / 2;
        return mark.bar(X(from) + bin * width, base - height, width - 1, height, isCut ? "pale" : "real");
      });
      const first = mark.triangles([[X(within(values[0])), base + 5]], "fake");
      return bars.join("") + first + mark.word(X(from) + 2, base - rowHeight + 26, name);
    }).join(""),
  });
}

// 3: the batch's size ------------------------------------------------------------------------------------------------------

const SIZES = [2, 8, 32, 128];

function matesScene(g, data) {
  const rounds = 8, few = 3, drawn = 8;
  const hero = (digit, seed, size) => generate(g, withMates(data, digit, seed, size), size, "batch", 1).images;
  return new Scene("mates", ({ digit, size, draw }, scene) => {
    const alone = rowOf(data.tenAlone, digit, IMAGE);
    const seeds = n => numbersTo(n === size ? rounds : few).map(later => draw + later);
    const bySize = SIZES.map(n => seeds(n).map(seed => hero(digit, seed, n)));
    const { images, pre, statistics } = generate(g, withMates(data, digit, draw, size), size, "batch", Math.min(size, drawn));
    showImages(scene.part("alone"), alone, 1, "the digit by running statistics");
    showImages(scene.part("hero"), rowOf(images, 0, IMAGE), 1, `the digit in a batch of ${size}`);
    showImages(scene.part("company"), images.subarray(IMAGE), drawn - 1, "some of its mates");
    showImages(scene.part("rounds"), join(bySize[SIZES.indexOf(size)]), rounds, "the same digit among other mates");
    showDistances(scene.part("plot"), bySize.map(found => found.map(image => distance(image, alone))), data);
    const hat = rowOf(normalize(pre[0], statistics[0], g.norms[0].eps), 0, g.linears[0].outputs);
    const ones = hat.filter(value => Math.abs(Math.abs(value) - 1) < 0.01).length;
    const away = `the digit is ${say(distance(rowOf(images, 0, IMAGE), alone))} away from its picture by running statistics`;
    const near = `${ones} of its 128 values ẑ in the first layer are within 0.01 of −1 or 1`;
    scene.write("caption", `In this batch of ${size} ${away}; ${near}.`);
  });
}

/** Show distances by the batch's size: of this draw, of others, and as measured over many. */
function showDistances(host, bySize, { between, byMates }) {
  const from = 1.5, to = 170;
  showPlot(host, {
    x: { from, to, ticks: SIZES, label: "images in the batch", log: true },
    y: { from: 0, to: 1, ticks: [0, 0.25, 0.5, 0.75, 1], label: "distance" },
    words: `distance from the picture by running statistics: ${SIZES.map((n, i) => `${say(bySize[i][0])} at ${n}`).join(", ")}`,
    marks: (X, Y) => {
      const others = bySize.flatMap((found, i) => found.slice(1).map(away => [X(SIZES[i]), Y(away)]));
      return mark.line([[X(from), Y(between)], [X(to), Y(between)]], "dashed") +
        mark.word(X(to), Y(between) - 5, "two different digits", "end") +
        mark.line(byMates.map((away, i) => [X(SIZES[i]), Y(away)]), "quiet") +
        mark.dots(others, "real hollow") +
        mark.dots(bySize.map((found, i) => [X(SIZES[i]), Y(found[0])]), "fake", 5);
    },
  });
}

// 4: running statistics ----------------------------------------------------------------------------------------------------

/** Feeds running statistics that begin at mean 0 and variance 1, and keeps what was seen at each batch. */
class Feeding {
  constructor(g, { ten, tenAlone }, size, momentum) {
    Object.assign(this, { g, ten, tenAlone, size, momentum });
    const start = g.norms.map(({ mean }) => ({ mean: mean.map(() => 0), variance: mean.map(() => 1) }));
    this.steps = [this.look(start)];
  }

  /** Return running statistics with the images by them, and how far these are from the trained ones. */
  look(running) {
    const { images } = generate(this.g, this.ten, SHOWN, running);
    return { running, images, away: distance(images, this.tenAlone) };
  }

  feed() {
    const before = this.steps.at(-1).running, norms = this.g.norms;
    const { statistics } = generate(this.g, randomLatents(FED + this.steps.length, this.size), this.size, "batch", 0);
    const kl = average(before.map((layer, i) => klToRunning(statistics[i], layer, norms[i].eps)));
    const running = before.map((layer, i) => moveRunning(layer, statistics[i], this.size, this.momentum));
    this.steps.push({ ...this.look(running), kl });
  }
}

function momentumScene(g, data) {
  let feeding = new Feeding(g, data, BATCH, 0.1);
  return new Scene("momentum", ({ size, momentum, batches }, scene, deadline) => {
    if (feeding.size !== size || feeding.momentum !== momentum) feeding = new Feeding(g, data, size, momentum);
    const before = feeding.steps.length;
    while (feeding.steps.length <= batches && (feeding.steps.length === before || performance.now() < deadline)) feeding.feed();
    const steps = feeding.steps.slice(0, batches + 1), fed = steps.length - 1, { images, away } = steps.at(-1);
    if (fed < batches) scene.refresh();
    showImages(scene.part("now"), images, 5, "ten digits by the running statistics so far");
    showImages(scene.part("trained"), data.tenAlone, 5, "the same by the trained running statistics");
    const distances = { from: 0, to: 0.6, ticks: [0, 0.2, 0.4, 0.6], label: "distance" };
    const nats = { from: 0.003, to: 10, ticks: [0.01, 0.1, 1, 10], label: "nats per channel", log: true };
    showCourse(scene.part("away"), steps.map(step => step.away), distances);
    showCourse(scene.part("kl"), steps.map(step => step.kl), nats, 1 / size);
    const so = `After ${fed} batches of ${size} with momentum ${say(momentum)}`;
    scene.write("caption", `${so} the pictures are ${say(away)} away from those by the trained statistics.`);
  });
}

/** Show what became of a number by batches fed, where there is one, and what it comes to by chance. */
function showCourse(host, values, y, chance) {
  const x = { from: 0, to: 100, ticks: [0, 25, 50, 75, 100], label: "batches fed" };
  const within = value => Math.min(Math.max(value, y.from), y.to);
  showPlot(host, {
    x, y,
    words: `${y.label} after ${values.length - 1} batches: ${say(values.at(-1) ?? 0, 3)}`,
    marks: (X, Y) => {
      const points = values.flatMap((value, i) => (value === undefined ? [] : [[X(i), Y(within(value))]]));
      const height = chance && Y(within(chance));
      const floor = chance && mark.line([[X(x.from), height], [X(x.to), height]], "dashed") +
        mark.word(X(x.to), height + 14, "by chance alone: 1 / N", "end");
      return (floor ?? "") + (points.length ? mark.line(points, "real-line") + mark.dots(points.slice(-1), "fake", 5) : "");
    },
  });
}

// 5: what all latents share ------------------------------------------------------------------------------------------------

function eraseScene(g, { latents }) {
  const draw = z => [generate(g, z, BATCH, "batch", SHOWN).images, generate(g, z, SHOWN, "running").images];
  const plain = draw(latents);
  return new Scene("erase", ({ times, plus }, scene) => {
    const [batch, running] = draw(latents.map(value => times * value + plus));
    showImages(scene.part("batch"), batch, 5, "ten digits by their batch's statistics");
    showImages(scene.part("running"), running, 5, "the same by running statistics");
    const [byBatch, byRunning] = [distance(batch, plain[0]), distance(running, plain[1])].map(moved => say(moved, 3));
    scene.write("moved-batch", byBatch);
    scene.write("moved-running", byRunning);
    const change = `All 128 latents times ${say(times)} plus ${say(plus)}`;
    const moved = `the pictures move by ${byBatch} by the batch’s statistics, and by ${byRunning} by running ones`;
    scene.write("caption", `${change}: ${moved}.`);
  });
}

// 7: norms folded into their neighbours ------------------------------------------------------------------------------------

function foldScene(g, { latents, ten, tenAlone }) {
  const layers = fold(g), tenFolded = generateFolded(layers, ten, SHOWN);
  const largest = largestDifference(generate(g, latents, BATCH, "running").images, generateFolded(layers, latents, BATCH));
  const captions = {
    folded: `Folded: 3 layers instead of 5. Largest difference over 128 latents and all pixels: ${say(largest, 3)}.`,
    batch: "By the batch’s statistics there is nothing to fold: μ and σ² are other numbers for each batch.",
    running: "By running statistics μ and σ² are fixed, and each norm is a multiplication and an addition.",
  };
  return new Scene("fold", ({ folded, statistics, channel }, scene) => {
    if (folded && statistics === "batch") return scene.set({ statistics: "running" }, false);
    scene.root.classList.toggle("is-folded", Boolean(folded));
    scene.root.querySelector('[value="batch"]').disabled = Boolean(folded);
    const images = folded ? tenFolded : statistics === "batch" ? generate(g, ten, SHOWN, "batch").images : tenAlone;
    showImages(scene.part("digits"), images, 5, "ten digits");
    const [plain, one] = [g.linears[0], layers[0]], row = layer => rowOf(layer.weight, channel, LATENT).map(value => 6 * value);
    showBars(scene.part("row"), row(plain), `100 weights of channel ${channel}`);
    showBars(scene.part("folded-row"), row(one), "the same weights folded");
    scene.write("bias", say(plain.bias[channel], 3));
    scene.write("folded-bias", say(one.bias[channel], 3));
    scene.write("scale", say(one.scale[channel], 3));
    return scene.write("caption", captions[folded ? "folded" : statistics]);
  });
}
