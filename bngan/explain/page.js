// How do controls, captions, pictures and the address show one state?

/** Write a number with a true minus sign, to some decimal places or, where that would show zeros, as a power of ten. */
function say(value, places = 2) {
  const small = value !== 0 && Math.abs(value) < 0.5 * 10 ** -places;
  if (!small) return value.toFixed(places).replace("-", "−").replace(/^−(0\.?0*)$/, "$1");
  const [digits, exponent] = value.toExponential(0).replaceAll("-", "−").split("e");
  const raised = [...exponent].map(letter => "⁰¹²³⁴⁵⁶⁷⁸⁹"[letter] ?? "⁻").join("");
  return `${digits}\u00a0×\u00a010${raised}`;
}

/**
 * A section of the page. Its state is what its inputs hold, named "scene.key"; whatever changes one draws all of it anew.
 *
 * draw(state, scene, deadline) is called at most once a frame.
 */
class Scene {
  constructor(id, draw) {
    this.id = id;
    this.root = document.getElementById(id);
    this.draw = draw;
    this.inputs = [...this.root.querySelectorAll("input[name]")];
    this.defaults = this.state;
    this.inputs.filter(input => input.type === "range").forEach(input => this.addSteps(input));
    this.root.addEventListener("input", () => this.refresh());
    this.root.addEventListener("change", () => this.settle());
    for (const button of this.root.querySelectorAll("[data-next]")) {
      button.addEventListener("click", () => this.set({ [button.dataset.next]: this.state[button.dataset.next] + 1 }));
    }
    for (const button of this.root.querySelectorAll("[data-set]")) {
      button.addEventListener("click", () => this.set(JSON.parse(button.dataset.set)));
    }
  }

  get state() {
    const state = {};
    for (const input of this.inputs) {
      const key = input.name.split(".")[1];
      if (input.type === "checkbox") state[key] = Number(input.checked);
      else if (input.type !== "radio" || input.checked) {
        state[key] = input.dataset.text === undefined ? Number(input.value) : input.value;
      }
    }
    return state;
  }

  /** Change some of the state, as the reader's hand would. */
  set(changes, settled = true) {
    for (const input of this.inputs) {
      const value = changes[input.name.split(".")[1]];
      if (value === undefined) continue;
      if (input.type === "radio") input.checked ||= input.value === String(value); // which unchecks the others
      else if (input.type === "checkbox") input.checked = Boolean(Number(value));
      else input.value = value;
    }
    this.refresh();
    if (settled) this.settle();
  }

  part(name) {
    return this.root.querySelector(`[data-part="${name}"]`);
  }

  write(name, text) {
    this.part(name).textContent = text;
  }

  refresh() {
    if (this.waits) return;
    this.waits = true;
    requestAnimationFrame(() => {
      this.waits = false;
      this.show(performance.now() + 15);
    });
  }

  /** Draw the scene as its state has it; what can be done bit by bit goes on in the next frame after the deadline. */
  show(deadline = Infinity) {
    for (const input of this.inputs.filter(({ type }) => type === "range")) {
      input.parentElement.querySelector("output").textContent = String(input.value).replace("-", "−");
    }
    this.draw(this.state, this, deadline);
  }

  /** After a control is let go: read the caption to those who listen, and keep the state in the address. */
  settle() {
    requestAnimationFrame(() => {
      document.getElementById("spoken").textContent = this.part("caption")?.textContent ?? "";
      const changed = Object.entries(this.state).filter(([key, value]) => value !== this.defaults[key]);
      const query = new URLSearchParams(changed).toString();
      history.replaceState(null, "", `#${this.id}${query && `?${query}`}`);
    });
  }

  /** Name a slider, and put buttons for one step beside it, for those who cannot drag. */
  addSteps(input) {
    const label = input.parentElement.querySelector("span").textContent;
    input.setAttribute("aria-label", label);
    for (const [sign, word, place] of [["−", "less", "beforebegin"], ["+", "more", "afterend"]]) {
      const button = document.createElement("button");
      button.type = "button";
      button.className = "step";
      button.textContent = sign;
      button.setAttribute("aria-label", `${label}: ${word}`);
      button.addEventListener("click", () => {
        if (sign === "+") input.stepUp();
        else input.stepDown();
        input.dispatchEvent(new Event("input", { bubbles: true }));
        input.dispatchEvent(new Event("change", { bubbles: true }));
      });
      input.insertAdjacentElement(place, button);
    }
  }
}

/** Let a scene take on the state that the address holds, and bring it into view. */
function followAddress(scenes) {
  const [id, query] = location.hash.slice(1).split("?");
  const scene = scenes.find(found => found.id === id);
  if (!scene || !query) return;
  scene.set(Object.fromEntries(new URLSearchParams(query)));
  scene.root.scrollIntoView();
}

// Pictures ---------------------------------------------------------------------------------------------------------------

const LEVELS = 256;

const grey = () => value => Array(3).fill((value + 1) * 127.5);

/** Return colours for values in [-1, 1]: vermillion above 0, blue below, as pale as the page at 0. */
function signed() {
  const dark = isDark(); // asked once, since to ask takes longer than to paint
  const [paper, above, below] = dark ? [28, [242, 142, 75], [86, 180, 233]] : [250, [213, 94, 0], [0, 114, 178]];
  return value => (value > 0 ? above : below).map(part => paper + Math.abs(value) * (part - paper));
}

function isDark() {
  return matchMedia("(prefers-color-scheme: dark)").matches && !matchMedia("print").matches;
}

/** Return the colours of so many values from -1 to 1. */
function paletteOf(colours) {
  const colour = colours();
  return Array.from({ length: LEVELS }, (_, level) => colour((2 * level) / (LEVELS - 1) - 1));
}

/** Fill pixels with the colours of values, of which those beyond [-1, 1] are drawn as -1 and 1. */
function paint(pixels, values, palette) {
  for (let i = 0; i < values.length; i++) {
    const level = Math.round(((Math.min(Math.max(values[i], -1), 1) + 1) / 2) * (LEVELS - 1));
    for (let part = 0; part < 3; part++) pixels[4 * i + part] = palette[level][part];
    pixels[4 * i + 3] = 255;
  }
}

/** Fill a canvas with images (n, 784) side by side, and say in words what it shows. */
function showImages(canvas, images, columns, words, colours = grey) {
  const palette = paletteOf(colours);
  const n = images.length / IMAGE, rows = Math.ceil(n / columns), gap = n > 1 ? 2 : 0;
  canvas.width = columns * (28 + gap) - gap;
  canvas.height = rows * (28 + gap) - gap;
  const context = canvas.getContext("2d");
  const picture = context.createImageData(28, 28);
  for (let image = 0; image < n; image++) {
    paint(picture.data, images.subarray(image * IMAGE, (image + 1) * IMAGE), palette);
    context.putImageData(picture, (image % columns) * (28 + gap), Math.floor(image / columns) * (28 + gap));
  }
  describe(canvas, words);
}

/** Fill a canvas with values as a row of coloured bars, full colours for -3 and 3. */
function showBars(canvas, values, words) {
  canvas.width = values.length;
  canvas.height = 1;
  const picture = canvas.getContext("2d").createImageData(values.length, 1);
  paint(picture.data, values.map(value => value / 3), paletteOf(signed));
  canvas.getContext("2d").putImageData(picture, 0, 0);
  describe(canvas, words);
}

function describe(element, words) {
  element.setAttribute("role", "img");
  element.setAttribute("aria-label", words);
}

/** Put a choice of pictures in a place: one radio button for each image (n, 784). */
function addChooser(host, name, images, words, colours = grey) {
  for (let i = 0; i < images.length / IMAGE; i++) {
    const label = document.createElement("label");
    const input = Object.assign(document.createElement("input"), { type: "radio", name, value: i });
    input.checked = i === Number(host.dataset.default);
    const canvas = document.createElement("canvas");
    showImages(canvas, images.subarray(i * IMAGE, (i + 1) * IMAGE), 1, words(i), colours);
    label.append(input, canvas);
    host.append(label);
  }
}

// Plots ------------------------------------------------------------------------------------------------------------------

/**
 * Draw a plot into a place, as wide as that is.
 *
 * x, y: {from, to, ticks, label, log}; without y there is but one axis. marks(X, Y) returns SVG in pixels.
 */
function showPlot(host, { x, y, height = 190, words, marks }) {
  const width = Math.max(host.clientWidth, 120);
  const left = y ? 44 : 12, right = width - 12, top = 10, bottom = height - 36;
  const place = ({ from, to, log }, start, end) => {
    const scale = log ? Math.log : value => value;
    return value => start + ((scale(value) - scale(from)) / (scale(to) - scale(from))) * (end - start);
  };
  const X = place(x, left, right), Y = y ? place(y, bottom, top) : () => bottom;
  const tick = value => String(value).replace("-", "−");
  const roomy = (right - left) / x.ticks.length > 34; // or each second one must do
  const vertical = x.ticks.filter((_, i) => roomy || i % 2 === 0).map(value =>
    `<line class="grid" x1="${X(value)}" x2="${X(value)}" y1="${top}" y2="${bottom}"/>
    <text x="${X(value)}" y="${bottom + 15}" text-anchor="middle">${tick(value)}</text>`);
  const horizontal = (y?.ticks ?? []).map(value =>
    `<line class="grid" x1="${left}" x2="${right}" y1="${Y(value)}" y2="${Y(value)}"/>
    <text x="${left - 6}" y="${Y(value) + 4}" text-anchor="end">${tick(value)}</text>`);
  const turned = `transform="translate(11 ${(top + bottom) / 2}) rotate(-90)"`;
  const titles = `<text x="${(left + right) / 2}" y="${height - 4}" text-anchor="middle">${x.label}</text>
    ${y ? `<text ${turned} text-anchor="middle">${y.label}</text>` : ""}`;
  host.innerHTML = `<svg viewBox="0 0 ${width} ${height}" width="${width}" height="${height}">
    ${vertical.join("")}${horizontal.join("")}${titles}${marks(X, Y)}</svg>`;
  describe(host.firstChild, words);
}

/** Return numbers in pixels as a path or an element has them. */
const pixels = (...values) => values.map(value => value.toFixed(1)).join(" ");

// What plots are made of. Many dots are one path, since hundreds of elements would take longer than the networks.
const mark = {
  dots(points, kind, size = 3) {
    const circle = `a${size} ${size} 0 1 0 ${2 * size} 0a${size} ${size} 0 1 0 ${-2 * size} 0`;
    return `<path class="${kind}" d="${points.map(([x, y]) => `M${pixels(x - size, y)}${circle}`).join("")}"/>`;
  },
  triangles(points, kind, size = 4) {
    const shape = `h${2 * size}l${-size} ${-1.7 * size}z`;
    return `<path class="${kind}" d="${points.map(([x, y]) => `M${pixels(x - size, y + 0.8 * size)}${shape}`).join("")}"/>`;
  },
  line(points, kind) {
    return `<path class="line ${kind}" d="M${points.map(point => pixels(...point)).join("L")}"/>`;
  },
  bar(x, y, width, height, kind) {
    return `<path class="${kind}" d="M${pixels(x, y)}h${pixels(width)}v${pixels(height)}h${pixels(-width)}z"/>`;
  },
  rule(x, y) {
    return `<path class="line strong" d="M${pixels(x, y - 14)}v28"/>`;
  },
  word(x, y, text, anchor = "start") {
    return `<text class="word" x="${pixels(x)}" y="${pixels(y)}" text-anchor="${anchor}">${text}</text>`;
  },
};
