// What does the reader expect, and what comes out?

/** Return for each question a function that works out its answer in words. */
function answers(g, d, data) {
  const fakes = generate(g, data.latents, BATCH, "batch").images;
  const brighten = (network, count) => {
    const real = linear(network.linears[0], data.real, BATCH), first = new FirstLayer(network.linears[0], fakes);
    const logits = change => discriminate(network, real, first.changed(change), "separate").fake.subarray(0, count);
    return average(logits({ brightness: 0.5, count })) - average(logits({}));
  };
  const draw = z => generate(g, z, BATCH, "batch", SHOWN).images;
  return {
    pair() {
      const { pre, statistics } = generate(g, randomLatents(1, 2), 2, "batch", 0);
      const hat = normalize(pre[0], statistics[0], g.norms[0].eps), width = g.linears[0].outputs;
      return `In one channel of a batch of two: ${say(hat[0], 4)} and ${say(hat[width], 4)}. The mean lies in the middle between
        two values, and both are one standard deviation from it; ε takes a trace away.`;
    },
    double() {
      const moved = distance(draw(data.latents.map(value => 2 * value)), draw(data.latents));
      return `The pictures moved by ${say(moved, 3)}. The mean and the standard deviation double with the values, so the first
        ẑ is what it was, but for ε.`;
    },
    last() {
      const statistics = seed => generate(g, randomLatents(seed, BATCH), BATCH, "batch", 0).statistics[0];
      let running = g.norms[0];
      for (let seed = 1; seed <= 10; seed++) running = moveRunning(running, statistics(seed), BATCH, 1);
      const away = largestDifference(running.mean, statistics(10).mean);
      return `After ten batches the running means are ${away} away from the tenth batch’s: (1 − 1) times what was before,
        and 1 times the last.`;
    },
    half() {
      return `The mean logit of those 64 moved by ${say(brighten(d, 64))}. What only some share is no common offset: the mean
        that is subtracted takes away half of it, and the rest stays.`;
    },
    random() {
      return `It moved by ${say(brighten(untrained(d, 2), BATCH), 3)}. Blindness is not learned: it is in the subtraction of the
        mean, whatever the weights are.`;
    },
  };
}

/** Let each question show its answer once the reader has chosen one. */
function addGuesses(found) {
  const questions = [...document.querySelectorAll("[data-question]")];
  for (const question of questions) {
    question.addEventListener("change", ({ target }) => {
      const isRight = target.dataset.right !== undefined;
      question.dataset.guessed = isRight ? "right" : "wrong";
      question.querySelector(".answer").textContent = `${isRight ? "Yes." : "No."} ${found[question.dataset.question]()}`;
      const right = questions.filter(({ dataset }) => dataset.guessed === "right").length;
      document.getElementById("guessed").textContent = `${right} of ${questions.length} guessed right.`;
    });
  }
}
