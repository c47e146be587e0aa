// Choosing a scan by typing a part of its name; the page never holds the names of all.

import { get, h } from "./api.js";

let counter = 0;

export class Picker {
  constructor(label, { onchange = () => {}, empty = "" } = {}) {
    const list = h("datalist", { id: `scans-${counter++}` });
    this.label = label;
    this.found = new Map();
    this.searched = { text: "", total: 0 }; // what was looked for last, and its only scan, if one alone has it
    this.input = h("input", { type: "search", placeholder: empty || "a part of its name", autocomplete: "off" });
    this.input.setAttribute("list", list.id);
    this.element = h("label", {}, label, this.input, list);
    const fill = async () => {
      const text = this.input.value;
      const page = await get(`/api/scans?limit=20&search=${encodeURIComponent(text)}`);
      if (text !== this.input.value) return; // typed on meanwhile
      this.searched = { text, total: page.total, only: page.total === 1 ? page.rows[0] : undefined };
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
    return this.found.get(this.input.value) ?? this.#only?.index;
  }

  // Its whole name.
  get name() {
    return this.found.has(this.input.value) ? this.input.value : this.#only?.image;
  }

  // The scan that alone has what is typed.
  get #only() {
    return this.input.value && this.searched.text === this.input.value ? this.searched.only : undefined;
  }

  // Why none is chosen.
  get missing() {
    const { text, total } = this.searched;
    if (!this.input.value || text !== this.input.value) return `${this.label}: choose one first.`;
    return total ? `${this.label}: ${total} scans have “${text}” in their rows: type more of the name.` : `${this.label}: no scan has “${text}” in its row.`;
  }

  set(row) {
    this.found.set(row.image, row.index);
    this.input.value = row.image;
  }
}
