// Latents: the population prior's leading factors as sliders, of the mean brain or of a scan.

import { h, Latest, run } from "./api.js";
import { Picker } from "./picker.js";
import { Viewer } from "./viewer.js";

const FIRST = 12; // sliders that are shown at once
const REACH = 4; // standard deviations

export function makeLatents(section, about) {
  if (!about.factors) {
    section.append(h("p", { className: "message", textContent: "These weights have no population prior, whose factors would be here: train, or run fit_prior, which leave one." }));
    return () => {};
  }
  let start = Array(about.factors).fill(0);
  let coordinates = [...start];
  let scan = ""; // that `start` is of; none: the mean brain
  let begins = 0;
  const latest = new Latest();
  const message = h("p", { className: "message", role: "alert" });
  const picker = new Picker("Start from", { empty: "the mean brain", onchange: begin });
  const reset = h("button", { textContent: "Reset", onclick: () => { coordinates = [...start]; fill(); draw(); } });
  const mean = h("button", { textContent: "Mean brain", onclick: () => { picker.input.value = ""; begin(undefined); } });
  const count = h("select", { ariaLabel: "How many factors", onchange: () => fill() },
    ...[FIRST, 24, about.factors].filter((n, i, all) => n <= about.factors && all.indexOf(n) === i)
      .map((n) => h("option", { value: n, textContent: `${n} factors` })));
  if (!count.options.length) count.append(h("option", { value: about.factors, textContent: `${about.factors} factors` }));
  const factors = h("div", { className: "factors" });
  const time = h("span", { className: "quiet" });
  const stage = h("div", { className: "stage" }, message);
  section.append(h("div", { className: "side" },
    h("p", { className: "quiet", style: "margin:0", textContent: "The population prior's factors, in standard deviations of the cohort, and the share of the explained variance that each explains." }),
    h("div", { className: "row" }, picker.element, mean, reset, count), factors, time), stage);
  const viewer = new Viewer(stage);

  function fill() {
    factors.replaceChildren(...coordinates.slice(0, Number(count.value)).map((value, place) => {
      const shown = h("output", { textContent: value.toFixed(1) });
      const reach = Math.max(REACH, Math.ceil(Math.abs(start[place])));
      const slider = h("input", {
        type: "range", min: -reach, max: reach, step: 0.1, ariaLabel: `Factor ${place + 1}`,
        oninput: () => { coordinates[place] = Number(slider.value); shown.textContent = coordinates[place].toFixed(1); draw(); },
      });
      slider.value = value;
      return h("label", {}, `${place + 1} (${(100 * about.explained[place]).toFixed(1)} %)`, slider, shown);
    }));
  }

  function draw() {
    return latest.ask(async () => {
      const began = performance.now();
      try {
        message.textContent = "";
        const caption = scan ? `What ${about.factors} factors say of ${scan}` : "The mean brain, as the factors change it";
        const file = scan || "mean brain";
        const job = await run("decode", { coordinates: [...coordinates], start: [...start] });
        if (!job) return;
        await viewer.show({
          caption, file,
          bases: [{ name: "decoded", label: "decoded", file: job.files["decoded.nii.gz"] }],
          overlays: [{ name: "difference", label: "difference", file: job.files["difference.nii.gz"], signed: true, most: 0.3, from: 0.03, unit: "from the start, in intensity; blue darker, orange brighter" }],
        });
        time.textContent = `Redrawn in ${((performance.now() - began) / 1000).toFixed(2)} s.`;
      } catch (error) {
        message.textContent = error.message;
      }
    });
  }

  async function begin(index) {
    message.textContent = "";
    const mine = ++begins;
    const name = index === undefined ? "" : picker.name;
    try {
      const job = index === undefined ? null : await run("coordinates", { index });
      if (mine !== begins) return; // another one was chosen meanwhile
      scan = job ? name : "";
      start = job?.result.coordinates ?? Array(about.factors).fill(0);
      if (!job) picker.input.value = "";
      coordinates = [...start];
      fill();
      await draw();
    } catch (error) {
      if (mine === begins) message.textContent = error.message;
    }
  }

  let begun = false;
  document.addEventListener("channel", () => { if (begun) draw(); });
  const open = () => { if (!begun) { begun = true; begin(undefined); } };
  open.select = (row) => { if (begun) return; picker.set(row); begun = true; begin(row.index); };
  return open;
}
