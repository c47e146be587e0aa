// Volumes in three planes and in 3D, by NiiVue; with an overlay, its opacity and threshold, and bars that say the units.

import { h } from "./api.js";

// Orange and blue on grey are told apart by colour-blind people too. R, G, B and A at the places I, 0 to 255; what is
// exactly 0 has the first colour, which is transparent.
const MAPS = {
  warm: { R: [200, 200, 255, 255], G: [40, 40, 110, 255], B: [0, 0, 20, 60], A: [0, 160, 220, 255], I: [0, 1, 128, 255] },
  cold: { R: [0, 0, 0, 235], G: [70, 70, 170, 250], B: [200, 200, 255, 255], A: [0, 160, 220, 255], I: [0, 1, 128, 255] },
};
const SIGNED = "linear-gradient(90deg, #ebfaff, #00aaff, #0046c8, #222 50%, #c82800, #ff6e14, #ffff3c)";
const VIRIDIS = "linear-gradient(90deg, #440154, #3b528b, #21918c, #5ec962, #fde725)";
const GREY = "linear-gradient(90deg, #000, #fff)";
// NiiVue's colour map type whose colours go from 0 to the maximum and that hides what is below the minimum; type 1, the other
// one with colours from 0, lets it fade. In the enum of NiiVue their names are the other way round.
const HIDDEN_BELOW = 2;
const SUFFIX = /\.(nii(\.gz)?|mg[hz]|nrrd|mha)(?= |$)/gi;

const bar = (gradient, low, high, label) =>
  h("span", { className: "bar" }, low, h("i", { style: `background: ${gradient}` }), high, ` ${label}`);

export class Viewer {
  // bases and overlays: [{name, label, file, most, unit, signed}]; those of one volume alone show no choices. An overlay
  // without file has load(signal, onProgress), which gives {file, unit}, or null if it was given up.
  // hint: says what will be shown, until something is.
  constructor(parent, hint = "") {
    this.caption = h("p", { className: "caption" });
    this.base = h("select", { ariaLabel: "Image", onchange: () => this.redraw() });
    this.overlay = h("select", { ariaLabel: "Overlay", onchange: () => this.#choose() });
    this.opacity = h("input", { type: "range", min: 0, max: 1, step: 0.05, value: 0.8, ariaLabel: "Opacity", oninput: () => this.#restyle() });
    this.threshold = h("input", { type: "range", min: 0, max: 6, step: 0.1, value: 2, ariaLabel: "Threshold", oninput: () => this.#restyle() });
    this.number = h("output");
    this.shown = h("select", { ariaLabel: "Planes or 3D", onchange: () => this.#slices() },
      ...["Three planes", "Axial", "Coronal", "Sagittal", "3D"].map((name) => h("option", { textContent: name })));
    this.download = h("a", { textContent: "Download NIfTI", href: "#" });
    this.downloadOverlay = h("a", { textContent: "Download overlay", href: "#", hidden: true });
    this.bars = h("div", { className: "bars" });
    this.overlayControls = h("span", { className: "row" },
      h("label", {}, "Overlay", this.overlay), h("label", {}, "Opacity", this.opacity),
      h("label", {}, "Threshold", this.threshold, this.number));
    this.baseControl = h("label", {}, "Image", this.base);
    this.canvas = h("canvas");
    const controls = h("div", { className: "row controls" }, this.baseControl, this.overlayControls, this.shown, this.download, this.downloadOverlay);
    this.element = h("div", { className: "viewer" }, this.caption, h("div", { className: "canvas" }, this.canvas), this.bars, controls);
    this.element.viewer = this;
    this.overlays = [];
    this.bases = [];
    this.element.hidden = true;
    parent.append(this.element, h("p", { className: "hint", textContent: hint }));
  }

  async #start() {
    if (this.nv) return;
    const { Niivue } = window.niivue;
    this.nv = new Niivue({
      backColor: [0, 0, 0, 1], crosshairColor: [0.09, 0.75, 0.81, 0.6], crosshairWidth: 0.15, loadingText: "",
      isColorbar: false, isRadiologicalConvention: false, multiplanarShowRender: 1, multiplanarLayout: 2,
      dragAndDropEnabled: false, show3Dcrosshair: true, logLevel: "error",
    });
    await this.nv.attachToCanvas(this.canvas);
    if (!this.nv.gl) throw new Error("This browser shows no WebGL2: turn on hardware acceleration, or use another one.");
    for (const [name, map] of Object.entries(MAPS)) this.nv.addColormap(name, map);
    this.#slices();
  }

  #slices() {
    const type = this.nv && [3, 0, 1, 2, 4][this.shown.selectedIndex];
    if (this.nv) this.nv.setSliceType(type);
  }

  // Two viewers whose crosshairs move together.
  async link(other) {
    await this.#start();
    await other.#start();
    this.nv.broadcastTo([other.nv], { "2d": true, "3d": true });
    other.nv.broadcastTo([this.nv], { "2d": true, "3d": true });
  }

  // file: what the names of downloaded files begin with, such as the scan's name. place: where the crosshair goes, in mm.
  async show({ caption = "", file = "", bases, overlays = [], base, overlay, place }) {
    this.element.hidden = false;
    await this.#start();
    this.stop?.abort();
    const chosen = [base ?? this.base.value, overlay ?? this.overlay.value];
    this.bases = bases;
    this.overlays = overlays;
    this.caption.textContent = caption;
    this.file = file;
    const options = (items) => items.map((item) => h("option", { value: item.name, textContent: item.label }));
    this.base.replaceChildren(...options(bases));
    this.overlay.replaceChildren(h("option", { value: "", textContent: "none" }), ...options(overlays));
    if (bases.some((item) => item.name === chosen[0])) this.base.value = chosen[0];
    if (overlays.some((item) => item.name === chosen[1])) this.overlay.value = chosen[1];
    this.baseControl.hidden = bases.length < 2;
    this.overlayControls.hidden = !overlays.length;
    this.#limits();
    this.place = place;
    await this.redraw();
  }

  // An overlay that is chosen is made anew if it was given up or failed before.
  #choose() {
    this.stop?.abort();
    const [, over] = this.#current();
    if (over) over.state = "";
    this.#limits();
    this.redraw();
  }

  #current() {
    return [this.bases.find((item) => item.name === this.base.value), this.overlays.find((item) => item.name === this.overlay.value)];
  }

  #limits() {
    const [, over] = this.#current();
    if (!over) return;
    Object.assign(this.threshold, { max: over.most, step: over.most / 60 });
    if (this.limited === over.name) return; // it stays where it was put
    this.limited = over.name;
    this.threshold.value = over.from;
  }

  // One redraw at a time; the last that was asked for is always made.
  async redraw() {
    this.again = true;
    if (this.drawing) return this.drawing;
    this.drawing = (async () => {
      while (this.again) {
        this.again = false;
        await this.#draw();
      }
    })();
    try {
      await this.drawing;
    } finally {
      this.drawing = null;
    }
  }

  // What takes long is made when it is chosen; meanwhile, and after an error, its bar says so.
  async #load(over) {
    const stop = (this.stop = new AbortController());
    over.state = "working";
    const state = (text) => { if (!stop.signal.aborted) over.state = text; };
    try {
      const made = await over.load(stop.signal, (done, total) => { state(`${done} of ${total}`); this.#restyle(); });
      state(made ? "" : "cancelled");
      Object.assign(over, made);
    } catch (error) {
      state(error.message);
    }
    if (!stop.signal.aborted && this.overlays.includes(over)) this.redraw();
  }

  async #draw() {
    const [base, over] = this.#current();
    if (!base) return;
    if (over && !over.file && !over.state) this.#load(over);
    const volumes = [{ url: base.file, name: `${base.name}.nii.gz`, colormap: "gray", cal_min: 0, cal_max: 1 }];
    if (over?.file) {
      const maps = over.signed ? { colormap: "warm", colormapNegative: "cold" } : { colormap: "viridis" };
      volumes.push({ url: over.file, name: `${over.name}.nii.gz`, cal_min: Number(this.threshold.value), cal_max: over.most, ...maps });
    }
    const place = this.nv.volumes.length ? [...this.nv.scene.crosshairPos] : null;
    await this.nv.loadVolumes(volumes);
    if (this.place) this.nv.scene.crosshairPos = this.nv.mm2frac(this.place);
    else if (place) this.nv.scene.crosshairPos = place;
    this.place = null;
    this.#offer(this.download, base);
    this.downloadOverlay.hidden = !over?.file;
    if (over?.file) this.#offer(this.downloadOverlay, over);
    this.#restyle();
    this.element.dataset.drawn = Number(this.element.dataset.drawn ?? 0) + 1;
  }

  #offer(link, item) {
    const name = `${this.file} ${item.name}`.replace(SUFFIX, "").replace(/[^\w.+-]+/g, "_").replace(/^[_.]+/, "");
    Object.assign(link, { href: item.file, download: `${name}.nii.gz` });
  }

  #restyle() {
    const [base, over] = this.#current();
    this.bars.replaceChildren(bar(GREY, "0", "1", `${base.label}: intensity, 0 background, 1 brightest`));
    const volume = this.nv.volumes[1];
    if (over && !over.file) this.bars.append(h("span", { textContent: `${over.label}: ${over.state}` }));
    if (!over?.file || !volume) return this.nv.drawScene();
    const from = Number(this.threshold.value);
    this.number.textContent = from.toPrecision(2);
    this.bars.append(bar(over.signed ? SIGNED : VIRIDIS, over.signed ? `−${over.text ?? over.most}` : "0", over.text ?? over.most, `${over.label}: ${over.unit}`));
    Object.assign(volume, { cal_min: Math.max(from, 1e-6), cal_max: over.most, colormapType: HIDDEN_BELOW });
    if (over.signed) Object.assign(volume, { cal_minNeg: -over.most, cal_maxNeg: -Math.max(from, 1e-6) });
    this.nv.setOpacity(1, Number(this.opacity.value));
    this.nv.updateGLVolume();
  }
}
