// Change: a scan under other covariates, and from one scan to another, each a film strip; and what is painted filled in.

import { h, run } from "./api.js";
import { covariateInputs } from "./covariates.js";
import { makeFill } from "./fill.js";
import { Picker } from "./picker.js";
import { Viewer } from "./viewer.js";

export function makeChange(section, about) {
  const message = h("p", { className: "message", role: "alert" });
  const first = new Picker("Scan");
  const second = new Picker("Second scan");
  const strip = h("div", { className: "sheet" });
  const stage = h("div", { className: "stage" }, message, strip);
  const boxes = about.levels.map(({ key, name }) => {
    const box = h("input", { type: "checkbox", checked: true, value: key });
    return [box, h("label", {}, box, name)];
  });
  const mixing = h("div", { className: "box" }, h("h2", { textContent: "Mix two scans" }),
    h("p", { className: "quiet", textContent: "Latents of the grids that are ticked go over to the second scan; the others stay those of the first." }),
    second.element, h("fieldset", {}, h("legend", { textContent: "Grids" }), ...boxes.map(([, label]) => label)),
    h("div", { className: "row", style: "margin-top:.5rem" }, h("button", { className: "main", textContent: "Mix", onclick: mix })));
  const side = h("div", { className: "side" }, h("div", { className: "box" }, first.element), changing(), mixing);
  section.append(side, stage);
  const viewer = new Viewer(stage, "Choose a scan, then change its age, sex or site, mix it with a second one, or paint on it: what becomes of it is shown here, step by step.");
  const filling = makeFill({ picker: first, viewer, say, clear: (redo) => { strip.replaceChildren(); again = redo; } });
  side.append(filling.element);

  function changing() {
    const box = h("div", { className: "box" }, h("h2", { textContent: "Change age, sex or site" }));
    if (!about.covariates.length) {
      box.append(h("p", { className: "quiet", textContent: "The population prior of these weights knows no covariates. Weights that were trained with --covariates, or a prior that fit_prior fits with them, bring this to life." }));
      return box;
    }
    const inputs = covariateInputs(about, "as it is");
    const films = about.covariates.map(({ name, kind, values }) => h("button", {
      textContent: kind === "continuous" ? `Film over ${name}` : `Each ${name}`,
      onclick: () => change({ ...inputs.values(), [name]: values.length > 10 ? values.slice(0, 10) : values }),
    }));
    box.append(h("div", { className: "row" }, ...inputs.elements),
      h("div", { className: "row", style: "margin-top:.5rem" }, h("button", { className: "main", textContent: "Change", onclick: () => change(inputs.values()) }), ...films));
    return box;
  }

  function change(covariates) {
    if (first.index === undefined) return say(first.missing);
    if (!Object.keys(covariates).length) return say("Fill in what is to change.");
    return ask("change", { index: first.index, covariates }, first.name);
  }

  function mix() {
    const lacking = [first, second].find((picker) => picker.index === undefined);
    if (lacking) return say(lacking.missing);
    const levels = boxes.filter(([box]) => box.checked).map(([box]) => box.value);
    if (!levels.length) return say("Tick a grid at least.");
    return ask("mix", { first: first.index, second: second.index, levels }, `${first.name} to ${second.name}`);
  }

  function say(text) {
    message.textContent = text;
  }

  let again = () => {};
  document.addEventListener("channel", () => again());

  async function ask(kind, args, title) {
    again = () => ask(kind, args, title);
    say("");
    strip.replaceChildren(h("span", { className: "quiet", textContent: "Working …" }));
    try {
      const job = await run(kind, args);
      strip.replaceChildren();
      if (job) fill(job, title);
    } catch (error) {
      strip.replaceChildren();
      say(error.message);
    }
  }

  function fill({ result, files }, scans) {
    const known = Object.entries(result.known ?? {}).map(([name, value]) => `${name} ${value}`).join(", ");
    const title = known ? `${scans} (${known})` : scans;
    strip.replaceChildren(...result.labels.map((label, place) => {
      const number = String(place).padStart(2, "0");
      const button = h("button", { "aria-pressed": "false", onclick: () => choose() }, h("img", { src: files[`frame_${number}.png`], alt: label }), label);
      const choose = () => {
        for (const other of strip.children) other.setAttribute("aria-pressed", other === button);
        filling.stop();
        return viewer.show({
          caption: `${title}: ${label}`, file: `${scans} ${label}`,
          bases: [{ name: `frame_${number}`, label: "frame", file: files[`frame_${number}.nii.gz`] }],
          overlays: [{ name: "difference", label: "difference", file: files[`difference_${number}.nii.gz`], signed: true, most: 0.3, from: 0.03, unit: "from the first, in intensity; blue darker, orange brighter" }],
        }).catch((error) => say(error.message));
      };
      return button;
    }));
    strip.lastChild?.click();
  }

  const open = () => {};
  open.select = (row) => first.set(row);
  return open;
}
