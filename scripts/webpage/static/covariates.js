// Inputs for the covariates that a population prior knows.

import { h } from "./api.js";

// elements, and values(): those that are filled in, by name.
export function covariateInputs(about, unset) {
  const inputs = about.covariates.map(({ name, kind, values }) => {
    const input = kind === "continuous"
      ? h("input", { type: "number", step: "any", placeholder: unset, title: `${values[0].toFixed(1)} to ${values.at(-1).toFixed(1)} in the cohort` })
      : h("select", {}, h("option", { value: "", textContent: unset }), ...values.map((value) => h("option", { value, textContent: value })));
    return { name, kind, input };
  });
  return {
    elements: inputs.map(({ name, input }) => h("label", {}, name, input)),
    values: () => Object.fromEntries(inputs.filter(({ input }) => input.value !== "")
      .map(({ name, kind, input }) => [name, kind === "continuous" ? Number(input.value) : input.value])),
  };
}
