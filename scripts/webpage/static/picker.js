// Choosing a scan by typing a part of its name; the page never holds the names of all.

import { get, h } from "./api.js";

let counter = 0;

export class Picker {
  constructor(label, { onchange = () => {}, empty = "" } = {}) {
    const list = h("datalist", { id: `scans-${counter++}` });
    this.found = new Map();
    this.input = h("input", { type: "search", placeholder: empty || "a part of its name", autocomplete: "off" });
    this.input.setAttribute("list", list.id);
    this.element = h("label", {}, label, this.input, list);
    const fill = async () => {
      const page = await get(`/api/scans?limit=20&search=${encodeURIComponent(this.input.value)}`);
      for (const row of page.rows) this.found.set(row.image, row.index);
      list.replaceChildren(...page.rows.map((row) => h("option", { value: row.image })));
    };
    this.input.onfocus = fill;
    this.input.oninput = async () => {
      await fill();
      if (this.index !== undefined || !this.input.value) onchange(this.index);
    };
  }

  // The number of the scan; undefined: none is chosen.
  get index() {
    return this.found.get(this.input.value);
  }

  set(row) {
    this.found.set(row.image, row.index);
    this.input.value = row.image;
  }
}
