// Inputs for the covariates that a population prior knows.

import { h } from "./api.js";

const short = (value) => Number(value.toPrecision(3));

// elements, and values(): those that are filled in, by name.
export function covariateInputs(about, unset) {
  const inputs = about.covariates.map(({ name, kind, values }) => {
    const input = kind === "continuous"
      ? h("input", { type: "number", step: "any", placeholder: unset })
      : h("select", {}, h("option", { value: "", textContent: unset }), ...values.map((value) => h("option", { value, textContent: value })));
    const range = kind === "continuous" ? `${short(values[0])} to ${short(values.at(-1))} in the cohort` : "";
    return { name, kind, input, range };
  });
  return {
    elements: inputs.map(({ name, input, range }) => h("label", {}, name, input, h("span", { className: "quiet", textContent: range }))),
    values: () => Object.fromEntries(inputs.filter(({ input }) => input.value !== "")
      .map(({ name, kind, input }) => [name, kind === "continuous" ? Number(input.value) : input.value])),
  };
}
