// What do the two networks compute? All of it is in doubles, and equals PyTorch's in float64.
//
// n rows of values lie one behind the other in a Float64Array, as in a tensor (n, values).

const IMAGE = 784;
const LATENT = 100;

// Weights ----------------------------------------------------------------------------------------------------------------

function bytesOf(base64) {
  const letters = atob(base64), bytes = new Uint8Array(letters.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = letters.charCodeAt(i);
  return bytes;
}

/** Decode numbers of half precision (IEEE 754, little endian); there are no infinite ones among them. */
function decodeHalf(bytes) {
  const units = Float64Array.from({ length: 32 }, (_, exponent) => 2 ** (Math.max(exponent, 1) - 25));
  const values = new Float64Array(bytes.length / 2);
  for (let i = 0; i < values.length; i++) {
    const bits = bytes[2 * i] | (bytes[2 * i + 1] << 8);
    const exponent = (bits >> 10) & 31;
    const magnitude = units[exponent] * ((bits & 1023) + (exponent ? 1024 : 0));
    values[i] = bits >> 15 ? -magnitude : magnitude;
  }
  return values;
}

function decodeFloat(bytes) {
  return Float64Array.from(new Float32Array(bytes.buffer));
}

/** Return a network of linear layers and norms from what the page has of it. */
function decodeNetwork(packed) {
  const vector = text => decodeFloat(bytesOf(text));
  const linears = packed.linears.map(({ weight, bias, outputs }) => {
    const matrix = decodeHalf(bytesOf(weight));
    return { weight: matrix, bias: vector(bias), outputs, inputs: matrix.length / outputs };
  });
  const norms = packed.norms.map(({ gamma, beta, mean, variance, eps }) => ({
    gamma: vector(gamma), beta: vector(beta), mean: vector(mean), variance: vector(variance), eps,
  }));
  return { linears, norms };
}

// Layers -----------------------------------------------------------------------------------------------------------------

/** Map n rows x (n, inputs) to W x + b (n, outputs). */
function linear({ weight, bias, inputs, outputs }, x, n) {
  const y = new Float64Array(n * outputs);
  // Four rows and two outputs at once, since fetching a number takes as long as using it; the last ones stand in for those beyond.
  for (let row = 0; row < n; row += 4) {
    const rows = [row, row + 1, row + 2, row + 3].map(number => Math.min(number, n - 1));
    const [first, second, third, fourth] = rows.map(number => number * inputs);
    for (let out = 0; out < outputs; out += 2) {
      const next = Math.min(out + 1, outputs - 1), one = out * inputs, other = next * inputs;
      let a = bias[out], b = a, c = a, d = a, e = bias[next], f = e, g = e, h = e;
      for (let i = 0; i < inputs; i++) {
        const w = weight[one + i], v = weight[other + i];
        const s = x[first + i], t = x[second + i], u = x[third + i], z = x[fourth + i];
        a += w * s;
        b += w * t;
        c += w * u;
        d += w * z;
        e += v * s;
        f += v * t;
        g += v * u;
        h += v * z;
      }
      [a, b, c, d].forEach((value, k) => (y[rows[k] * outputs + out] = value));
      [e, f, g, h].forEach((value, k) => (y[rows[k] * outputs + next] = value));
    }
  }
  return y;
}

/** Return each channel's mean and biased variance over n rows z (n, channels). */
function batchStatistics(z, n) {
  const channels = z.length / n;
  const mean = new Float64Array(channels), variance = new Float64Array(channels);
  for (let i = 0; i < z.length; i++) mean[i % channels] += z[i] / n;
  for (let i = 0; i < z.length; i++) variance[i % channels] += (z[i] - mean[i % channels]) ** 2 / n;
  return { mean, variance };
}

/** Return (z - mean) / sqrt(variance + eps). */
function normalize(z, { mean, variance }, eps) {
  const channels = mean.length;
  const scale = variance.map(value => 1 / Math.sqrt(value + eps));
  return z.map((value, i) => (value - mean[i % channels]) * scale[i % channels]);
}

/** Return gamma z_hat + beta, with what is below 0 multiplied by the slope: 0 is ReLU. */
function rescale(hat, { gamma, beta }, slope) {
  const channels = gamma.length;
  return hat.map((value, i) => {
    const y = gamma[i % channels] * value + beta[i % channels];
    return y < 0 ? slope * y : y;
  });
}

// Networks ---------------------------------------------------------------------------------------------------------------

/**
 * Draw images from n latents (n, 100).
 *
 * by: "batch", each channel's statistics over the n latents; "running", the norms' own; or a list of the two layers'.
 * drawn: of how many, the first ones, to work out the image, which takes most of the time.
 * Returns what the norms get, their statistics, the hidden values after ReLU, and the images (drawn, 784) in [-1, 1].
 */
function generate({ linears, norms }, latents, n, by, drawn = n) {
  const pre = [], statistics = [], hidden = [];
  let x = latents;
  norms.forEach((norm, layer) => {
    const z = linear(linears[layer], x, n);
    const used = by === "batch" ? batchStatistics(z, n) : by === "running" ? norm : by[layer];
    x = rescale(normalize(z, used, norm.eps), norm, 0);
    pre.push(z);
    statistics.push(used);
    hidden.push(x);
  });
  const images = linear(linears[2], x, drawn).map(Math.tanh);
  return { pre, statistics, hidden, images };
}

/** Judge n images in training mode, from what D's first layer makes of them, W x + b (n, 256): logits (n). */
function judge({ linears, norms }, first, n) {
  let z = first;
  norms.forEach((norm, layer) => {
    const x = rescale(normalize(z, batchStatistics(z, n), norm.eps), norm, 0.2);
    z = linear(linears[layer + 1], x, n);
  });
  return z;
}

/** Judge real images and fakes in one batch or each by themselves. */
function discriminate(discriminator, real, fake, batching) {
  const width = discriminator.linears[0].outputs;
  const reals = real.length / width, fakes = fake.length / width;
  if (batching === "separate") return { real: judge(discriminator, real, reals), fake: judge(discriminator, fake, fakes) };
  const both = new Float64Array(real.length + fake.length);
  both.set(real);
  both.set(fake, real.length);
  const logits = judge(discriminator, both, reals + fakes);
  return { real: logits.slice(0, reals), fake: logits.slice(reals) };
}

/**
 * What D's first layer makes of images that are changed together: x becomes contrast x + brightness + stamp.
 *
 * W (c x + b 1 + s) is c W x + b W 1 + W s, so that nothing that takes long is done again when a slider moves.
 */
class FirstLayer {
  constructor(layer, images) {
    this.layer = layer;
    this.n = images.length / IMAGE;
    this.pre = linear(layer, images, this.n);
    this.ofOnes = this.without(new Float64Array(IMAGE).fill(1));
  }

  /** Return W x for one image. */
  without(image) {
    return linear(this.layer, image, 1).map((value, i) => value - this.layer.bias[i]);
  }

  /** Return W x' + b (n, 256) of all images, of which the first `count` are changed. */
  changed({ contrast = 1, brightness = 0, count = this.n, stamp = null }) {
    const { bias, outputs } = this.layer;
    const ofStamp = stamp ? this.without(stamp) : new Float64Array(outputs);
    const added = ofStamp.map((value, i) => value + brightness * this.ofOnes[i] + (1 - contrast) * bias[i]);
    return this.pre.map((value, i) => (i < count * outputs ? contrast * value + added[i % outputs] : value));
  }
}

/** Return linear layers that do what layers with norms by running statistics do. */
function fold({ linears, norms }) {
  const folded = norms.map(({ gamma, beta, mean, variance, eps }, layer) => {
    const { weight, bias, inputs, outputs } = linears[layer];
    const scale = gamma.map((value, i) => value / Math.sqrt(variance[i] + eps));
    return {
      weight: weight.map((value, i) => scale[Math.floor(i / inputs)] * value),
      bias: bias.map((value, i) => scale[i] * (value - mean[i]) + beta[i]),
      scale, inputs, outputs,
    };
  });
  return [...folded, linears[2]];
}

/** Draw images from n latents by folded layers alone. */
function generateFolded(layers, latents, n) {
  const relu = value => Math.max(value, 0);
  const first = linear(layers[0], latents, n).map(relu);
  const second = linear(layers[1], first, n).map(relu);
  return linear(layers[2], second, n).map(Math.tanh);
}

// Running statistics -----------------------------------------------------------------------------------------------------

/** Return running statistics that have moved towards a batch of n: (1 - momentum) running + momentum batch. */
function moveRunning(running, batch, n, momentum) {
  const unbiased = n / (n - 1); // the buffer has the unbiased variance, as in torch
  return {
    mean: running.mean.map((value, i) => (1 - momentum) * value + momentum * batch.mean[i]),
    variance: running.variance.map((value, i) => (1 - momentum) * value + momentum * unbiased * batch.variance[i]),
  };
}

/** Return KL(batch || running) in nats, averaged over the channels, both taken as Gaussians. */
function klToRunning(batch, running, eps) {
  const terms = batch.mean.map((mean, i) => {
    const ratio = (batch.variance[i] + eps) / (running.variance[i] + eps);
    return 0.5 * (ratio - 1 - Math.log(ratio) + (mean - running.mean[i]) ** 2 / (running.variance[i] + eps));
  });
  return average(terms);
}

// Numbers ----------------------------------------------------------------------------------------------------------------

function average(values) {
  return values.reduce((sum, value) => sum + value, 0) / values.length;
}

/** Return the root mean square difference over the pixels of each pair of images, averaged over the pairs. */
function distance(images, others) {
  const roots = [];
  for (let start = 0; start < images.length; start += IMAGE) {
    let sum = 0;
    for (let i = start; i < start + IMAGE; i++) sum += (images[i] - others[i]) ** 2;
    roots.push(Math.sqrt(sum / IMAGE));
  }
  return average(roots);
}

function largestDifference(values, others) {
  return values.reduce((largest, value, i) => Math.max(largest, Math.abs(value - others[i])), 0);
}

/** Return rows, each a Float64Array, one behind the other. */
function join(rows) {
  const joined = new Float64Array(rows.reduce((sum, row) => sum + row.length, 0));
  let start = 0;
  for (const row of rows) {
    joined.set(row, start);
    start += row.length;
  }
  return joined;
}

/** Return a function of numbers in (0, 1) that depend on the seed alone (splitmix, of 32 bits). */
function uniform(seed) {
  let state = Math.imul(seed, 0x85ebca6b);
  return () => {
    state = (state + 0x9e3779b9) | 0;
    let mixed = Math.imul(state ^ (state >>> 16), 0x21f0aaad);
    mixed = Math.imul(mixed ^ (mixed >>> 15), 0x735a2d97);
    return (((mixed ^ (mixed >>> 15)) >>> 0) + 0.5) / 2 ** 32;
  };
}

/** Return n standard normal latents (n, 100) that depend on the seed alone (Box and Muller). */
function randomLatents(seed, n) {
  const next = uniform(seed);
  return Float64Array.from({ length: n * LATENT }, () => Math.sqrt(-2 * Math.log(next())) * Math.cos(2 * Math.PI * next()));
}

/** Return the latent at t in [0, 1] on the great circle from one to another, whose lengths need not be equal. */
function slerp(start, end, t) {
  const dot = (a, b) => a.reduce((sum, value, i) => sum + value * b[i], 0);
  const cosine = dot(start, end) / Math.sqrt(dot(start, start) * dot(end, end));
  const angle = Math.acos(Math.min(Math.max(cosine, -1 + 1e-6), 1 - 1e-6)); // which two equal latents need, as in bngan.images
  const [a, b] = [Math.sin((1 - t) * angle) / Math.sin(angle), Math.sin(t * angle) / Math.sin(angle)];
  return start.map((value, i) => a * value + b * end[i]);
}

/** Return a discriminator of the same shape whose weights are as torch draws them before training. */
function untrained({ linears, norms }, seed) {
  const next = uniform(seed);
  return {
    linears: linears.map(layer => {
      const bound = 1 / Math.sqrt(layer.inputs);
      const draw = () => bound * (2 * next() - 1);
      return { ...layer, weight: layer.weight.map(draw), bias: layer.bias.map(draw) };
    }),
    norms: norms.map(norm => ({ ...norm, gamma: norm.gamma.map(() => 1), beta: norm.beta.map(() => 0) })),
  };
}
