// Sample: new scans on a sheet; a click enlarges one, and two can be kept and compared.

import { h, run } from "./api.js";
import { covariateInputs } from "./covariates.js";
import { Viewer } from "./viewer.js";

export function makeSample(section, about) {
  const message = h("p", { className: "message", role: "alert" });
  const number = (value, min, max, step) => h("input", { type: "number", value, min, max, step });
  const count = number(8, 1, 36, 1);
  const seed = number(0, 0, 2147483647, 1);
  const usual = about.factors ? 1 : 0.7; // temperature
  const heat = h("input", { type: "range", min: 0, max: 1.5, step: 0.05, value: usual, oninput: say, ariaLabel: "Temperature" });
  const shown = h("output");
  const grids = about.levels.map(({ key, name }) => [key, h("input", { type: "number", min: 0, max: 2, step: 0.1, placeholder: "1", ariaLabel: `Temperature of grid ${name}` }), name]);
  const prior = h("select", {}, ...(about.factors ? [["population", "the cohort's (population prior)"]] : []).concat([["network", "the network's own"]])
    .map(([value, textContent]) => h("option", { value, textContent })));
  const covariates = covariateInputs(about, "of the cohort");
  const draw = h("button", { className: "main", textContent: "Draw", onclick: ask });
  const cancel = h("button", { textContent: "Cancel", disabled: true, onclick: () => stop?.abort() });
  const progress = h("span", { className: "quiet" });
  const sheet = h("div", { className: "sheet" });
  const pair = h("div", { className: "pair" });
  const keep = h("button", { textContent: "Keep on the left", disabled: true, onclick: () => { kept = current; show(left, kept); } });
  section.append(
    h("div", { className: "side" },
      h("div", { className: "row" }, h("label", {}, "Samples", count), h("label", {}, "Seed", seed)),
      h("label", {}, "Temperature", heat, shown),
      h("details", {}, h("summary", { textContent: "A temperature for each grid" }),
        h("div", { className: "row" }, ...grids.map(([, input, name]) => h("label", {}, name, input)))),
      h("label", {}, "Latents from", prior),
      ...(about.covariates.length ? [h("fieldset", {}, h("legend", { textContent: "Covariates" }), ...covariates.elements)] : []),
      h("div", { className: "row" }, draw, cancel, progress), message, sheet),
    h("div", { className: "stage" }, h("div", { className: "row" }, keep), pair));
  const left = new Viewer(pair, "“Keep on the left” keeps a sample here, to compare the next ones with it.");
  const right = new Viewer(pair, "The sample that is chosen on the sheet is shown here.");
  let stop = null, current = null, kept = null, linked = false;
  say();

  function say() {
    shown.textContent = Number(heat.value).toFixed(2);
  }

  function temperature() {
    const given = grids.filter(([, input]) => input.value !== "").map(([key, input]) => [key, Number(input.value)]);
    return given.length ? Object.fromEntries(given) : Number(heat.value);
  }

  async function ask() {
    stop = new AbortController();
    draw.disabled = true;
    cancel.disabled = false;
    message.textContent = "";
    try {
      const args = { count: Number(count.value), seed: Number(seed.value), temperature: temperature(), prior: prior.value };
      const values = covariates.values();
      if (Object.keys(values).length) args.covariates = values;
      const job = await run("sample", args, { signal: stop.signal, onProgress: (done, total) => { progress.textContent = `${done} of ${total}`; } });
      progress.textContent = job ? "" : "Cancelled.";
      if (job) fill(job, args);
    } catch (error) {
      message.textContent = error.message;
      progress.textContent = "";
    }
    draw.disabled = false;
    cancel.disabled = true;
  }

  // What samples were drawn with, in words.
  function describe({ seed, temperature, prior, covariates = {} }) {
    const heats = typeof temperature === "number" ? (temperature === usual ? "" : `temperature ${temperature}`)
      : grids.filter(([key]) => key in temperature).map(([key, , name]) => `temperature ${temperature[key]} at ${name}`).join(", ");
    const known = Object.entries(covariates).map(([name, value]) => `${name} ${value}`).join(", ");
    return [`seed ${seed}`, prior === "network" ? "the network's prior" : "the cohort's prior", heats, known].filter(Boolean).join(", ");
  }

  function fill({ files }, args) {
    const source = describe(args);
    const names = Object.keys(files).filter((name) => name.endsWith(".png")).map((name) => name.slice(0, -4));
    sheet.replaceChildren(...names.map((name, place) => {
      const item = { name, file: files[`${name}.nii.gz`], caption: `Sample ${place + 1} of ${source}`, sheet: source };
      const button = h("button", { "aria-pressed": "false", onclick: () => choose(item, button) },
        h("img", { src: files[`${name}.png`], alt: item.caption }), String(place + 1));
      return button;
    }));
    sheet.firstChild?.click();
  }

  async function choose(item, button) {
    for (const other of sheet.children) other.setAttribute("aria-pressed", other === button);
    current = item;
    keep.disabled = false;
    await show(right, item);
  }

  async function show(viewer, item) {
    try {
      await viewer.show({ caption: item.caption, file: item.sheet, bases: [{ name: item.name, label: "sample", file: item.file }] });
      if (!linked && viewer === left) {
        linked = true;
        await left.link(right);
      }
    } catch (error) {
      message.textContent = error.message;
    }
  }

  let begun = false;
  document.addEventListener("channel", () => {
    if (!begun) return;
    kept = null;
    left.element.hidden = true;
    ask();
  });
  return () => { if (!begun) { begun = true; ask(); } };
}
