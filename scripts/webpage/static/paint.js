// Painting voxels of the scan that a viewer shows, with NiiVue's pen, which this makes as deep as it is wide.

import { h } from "./api.js";

const OPACITY = 0.6;
const MOST_UNDO = 20;
const AXES = [2, 1, 0]; // across an axial, coronal, sagittal slice

export class Painter {
  constructor(viewer, onchange) {
    this.viewer = viewer;
    this.onchange = onchange;
    this.size = h("select", { onchange: () => this.#pen() }, ...[1, 3, 5, 7, 9, 15].map((n) => h("option", { value: n, textContent: n })));
    this.size.value = 3;
    this.deep = h("input", { type: "checkbox", checked: true });
    this.erase = h("input", { type: "checkbox", onchange: () => this.#pen() });
    this.controls = h("div", { className: "row" },
      h("label", { title: "Width of the pen, in voxels" }, "Pen", this.size), h("label", { title: "The pen is a cube, not a square in one slice" }, this.deep, "through slices"),
      h("label", {}, this.erase, "erase"),
      h("button", { textContent: "Undo", onclick: () => this.undo() }), h("button", { textContent: "Clear", onclick: () => this.clear() }));
    this.controls.hidden = true;
  }

  // Let the pen paint on what is shown; what was painted before stays, unless `anew`.
  start(anew) {
    const { nv } = this.viewer;
    if (anew) nv.closeDrawing();
    nv.setDrawingEnabled(true);
    if (anew) this.before = [];
    this.now = nv.drawBitmap.slice();
    nv.onDrawingChanged = (action) => { if (action === "draw") this.#stroke(); };
    nv.setDrawOpacity(OPACITY);
    this.#pen();
    this.controls.hidden = false;
    this.onchange();
  }

  stop() {
    if (this.controls.hidden) return;
    this.viewer.nv.setDrawingEnabled(false);
    this.viewer.nv.setDrawOpacity(0);
    this.controls.hidden = true;
  }

  get painting() {
    return !this.controls.hidden;
  }

  #pen() {
    const { nv } = this.viewer;
    nv.opts.penSize = Number(this.size.value);
    nv.setPenValue(this.erase.checked ? 0 : 1, false);
  }

  // What a stroke changed in one slice is changed in the slices around it too.
  #stroke() {
    const { nv } = this.viewer;
    const bitmap = nv.drawBitmap;
    const [, nx, ny, nz] = nv.back.dims;
    const axis = AXES[nv.drawPenAxCorSag];
    const reach = this.deep.checked && axis !== undefined ? Math.floor(nv.opts.penSize / 2) : 0;
    const step = [1, nx, nx * ny][axis], length = [nx, ny, nz][axis];
    const changed = [];
    bitmap.forEach((value, voxel) => { if (value !== this.now[voxel]) changed.push(voxel); });
    for (const voxel of changed) {
      const place = Math.floor(voxel / step) % length;
      for (let by = -Math.min(reach, place); by <= Math.min(reach, length - 1 - place); by++) bitmap[voxel + by * step] = bitmap[voxel];
    }
    this.before = [...this.before, this.now].slice(-MOST_UNDO);
    this.now = bitmap.slice();
    nv.refreshDrawing(true);
    this.onchange();
  }

  #put(bitmap) {
    this.viewer.nv.drawBitmap.set(bitmap);
    this.now = bitmap;
    this.viewer.nv.refreshDrawing(true);
    this.onchange();
  }

  undo() {
    if (this.before.length) this.#put(this.before.pop());
  }

  clear() {
    this.before = [...this.before, this.now].slice(-MOST_UNDO);
    this.#put(new Uint8Array(this.now.length));
  }

  get count() {
    return this.now.reduce((sum, value) => sum + (value > 0), 0);
  }

  // [start, length, start, length, ...] of what is painted, in the order of a NIfTI file.
  runs() {
    const runs = [];
    for (let voxel = 0; voxel < this.now.length; voxel++) {
      if (!this.now[voxel]) continue;
      const start = voxel;
      while (this.now[voxel + 1]) voxel++;
      runs.push(start, voxel + 1 - start);
    }
    return runs;
  }
}
