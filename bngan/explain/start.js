// What happens when the page is opened?

/** Return what is in one of the page's blocks of data. */
function block(id) {
  return JSON.parse(document.getElementById(id).textContent);
}

/** Work out what a test asks for by the page's own functions, from the numbers that it has put there. */
function selfTest(g, d, { latents, images, real, change, momentum }) {
  const z = Float64Array.from(latents.flat()), n = latents.length;
  const first = new FirstLayer(d.linears[0], Float64Array.from(images.flat()));
  const changed = first.changed({ ...change, stamp: Float64Array.from(change.stamp) });
  const reals = linear(d.linears[0], Float64Array.from(real.flat()), real.length);
  const { statistics } = generate(g, z, n, "batch");
  const judged = Object.fromEntries(BATCHINGS.map(batching => [batching, discriminate(d, reals, changed, batching)]));
  const plain = typed => (typed instanceof Float64Array ? [...typed] : typed);
  const results = {
    batch: generate(g, z, n, "batch").images,
    running: generate(g, z, n, "running").images,
    folded: generateFolded(fold(g), z, n),
    moved: g.norms.map((norm, layer) => moveRunning(norm, statistics[layer], n, momentum)),
    kl: g.norms.map((norm, layer) => klToRunning(statistics[layer], norm, norm.eps)),
    weight: g.linears[0].weight,
    middle: slerp(z.subarray(0, LATENT), z.subarray(LATENT, 2 * LATENT), 0.5),
    ...judged,
  };
  return JSON.stringify(results, (_, value) => plain(value));
}

const data = block("data");
const [g, d] = [data.generator, data.discriminator].map(decodeNetwork);
const shown = {
  ...data,
  latents: decodeHalf(bytesOf(data.latents)),
  real: Float64Array.from(bytesOf(data.real), value => value / 127.5 - 1),
};
if (location.hash === "#test") {
  document.getElementById("spoken").textContent = selfTest(g, d, block("test"));
} else {
  const scenes = [...generatorScenes(g, shown), verdictScene(g, d, shown)];
  const showAll = () => scenes.forEach(scene => scene.show());
  addGuesses(answers(g, d, shown));
  followAddress(scenes);
  showAll();
  let width = innerWidth;
  addEventListener("resize", () => {
    if (width !== innerWidth) scenes.forEach(scene => scene.refresh()); // a telephone's bar changes the height alone
    width = innerWidth;
  });
  addEventListener("hashchange", () => followAddress(scenes));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showAll);
  addEventListener("beforeprint", showAll);
  addEventListener("afterprint", showAll);
  document.documentElement.dataset.ready = "yes";
}
