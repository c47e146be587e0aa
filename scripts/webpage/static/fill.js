// Paint on a scan and have it filled in there: the mean of some draws, and how far these differ.

import { h, run } from "./api.js";
import { Painter } from "./paint.js";

// A box for the side; stop() puts the pen away, before the viewer shows something else. `clear` removes what else is shown, and
// is told how to show this again.
export function makeFill({ picker, viewer, say, clear }) {
  const draws = h("input", { type: "number", value: 8, min: 2, max: 64, step: 1 });
  const paint = h("button", { textContent: "Paint", onclick: begin });
  const fill = h("button", { className: "main", textContent: "Fill", disabled: true, onclick: ask });
  const cancel = h("button", { textContent: "Cancel", disabled: true, onclick: () => stop?.abort() });
  const progress = h("span", { className: "quiet" });
  const painter = new Painter(viewer, () => {
    progress.textContent = `${painter.count} voxels painted`;
    fill.disabled = !painter.count;
  });
  let scan = null, stop = null;
  const box = h("div", { className: "box" }, h("h2", { textContent: "Paint and fill" }),
    h("p", { className: "quiet", textContent: "Paint on the scan with the left mouse button; what is painted is filled in by what the network expects there, given the rest." }),
    h("div", { className: "row" }, paint, painter.controls),
    h("div", { className: "row", style: "margin-top:.5rem" }, fill, h("label", {}, "Draws", draws), cancel, progress));

  async function begin() {
    say("");
    const index = picker.index;
    if (index === undefined) return say(picker.missing);
    try {
      const job = await run("scan", { index });
      if (!job) return;
      const anew = scan?.index !== index;
      scan = { index, name: picker.name };
      clear(begin);
      await viewer.show({ caption: `${scan.name}: paint what is to be filled in`, file: scan.name, bases: [{ name: "scan", label: "scan", file: job.files["scan.nii.gz"] }] });
      painter.start(anew);
    } catch (error) {
      say(error.message);
    }
  }

  async function ask() {
    say("");
    stop = new AbortController();
    fill.disabled = paint.disabled = true;
    cancel.disabled = false;
    try {
      const args = { index: scan.index, mask: painter.runs(), draws: Number(draws.value) };
      const job = await run("fill", args, { signal: stop.signal, onProgress: (done, total) => { progress.textContent = `${done} of ${total}`; } });
      progress.textContent = job ? `${job.result.voxels} voxels filled in` : "Cancelled.";
      if (job) await show(job, args.draws);
    } catch (error) {
      say(error.message);
      progress.textContent = "";
    }
    fill.disabled = paint.disabled = false;
    cancel.disabled = true;
  }

  async function show({ result, files }, count) {
    painter.stop();
    clear(ask);
    const volume = (name, label) => ({ name, label, file: files[`${name}.nii.gz`] });
    const drawn = Array.from({ length: count }, (_, place) => volume(`draw_${String(place).padStart(2, "0")}`, `draw ${place + 1}`));
    const most = Math.max(result.largest_spread, 1e-4);
    await viewer.show({
      caption: `${scan.name}: filled in`, file: scan.name,
      bases: [volume("filled", "filled in (mean)"), ...drawn, volume("scan", "scan")],
      overlays: [
        { ...volume("spread", "spread of draws"), most, text: most.toFixed(3), from: 0, unit: "standard deviation over draws, in intensity" },
        { ...volume("difference", "difference"), signed: true, most: 0.3, from: 0.03, unit: "from the scan, in intensity; blue darker, orange brighter" },
      ],
      base: "filled", overlay: "spread",
    });
  }

  return { element: box, stop: () => painter.stop() };
}
