// Asking the program that serves the page: every error is a sentence.

export class Refusal extends Error {}

async function answer(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Refusal("The program that serves this page does not answer: has it been ended?");
  }
  const content = await response.json().catch(() => ({}));
  if (!response.ok) throw new Refusal(content.error ?? `The program answered with an error (${response.status}).`);
  return content;
}

export const get = (path) => answer(path);

// What all views show, of scans of several channels; it is changed by the header, which sends the event "channel" then.
export const shown = { channel: 0 };
const OF_ALL_CHANNELS = ["score", "coordinates"];

const pause = (ms) => new Promise((done) => setTimeout(done, ms));

// Do a job and wait for its result: {result, files}. A signal (of an AbortController) gives it up; null is returned then.
export async function run(kind, args, { onProgress, signal } = {}) {
  let job = await answer("/api/jobs", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ kind, arguments: OF_ALL_CHANNELS.includes(kind) ? args : { ...args, channel: shown.channel } }),
  });
  for (let wait = 25; !["done", "failed", "cancelled"].includes(job.state); wait = Math.min(400, wait * 1.3)) {
    if (signal?.aborted) {
      await answer(`/api/jobs/${job.id}`, { method: "DELETE" });
      return null;
    }
    await pause(wait);
    job = await answer(`/api/jobs/${job.id}`);
    onProgress?.(job.done, job.total);
  }
  if (job.state === "failed") throw new Refusal(job.error);
  return job.state === "done" ? job : null;
}

// Runs one job at a time; what is asked for meanwhile replaces what waits, so that a slider never queues up.
export class Latest {
  #running = false;
  #next = null;

  async ask(work) {
    this.#next = work;
    if (this.#running) return;
    this.#running = true;
    try {
      while (this.#next) {
        const now = this.#next;
        this.#next = null;
        await now();
      }
    } finally {
      this.#running = false;
    }
  }
}

// The footer: what is being worked on, for whichever window it was asked for, with a button to give it up.
const NAMES = {
  score: "Scoring scans", view: "Opening a scan", coordinates: "Encoding a scan", decode: "Decoding",
  sample: "Drawing samples", change: "Changing covariates", mix: "Mixing scans",
  scan: "Opening a scan", fill: "Filling in",
  deviation: "Comparing with what is usual",
};

export async function watchJobs(footer) {
  for (;;) {
    try {
      const jobs = (await get("/api/jobs")).filter((job) => job.kind !== "decode");
      footer.replaceChildren(...jobs.map((job) => {
        const bar = h("progress", { max: job.total, value: job.done });
        const stop = h("button", { textContent: "Cancel", onclick: () => answer(`/api/jobs/${job.id}`, { method: "DELETE" }) });
        return h("span", { className: "job" }, `${NAMES[job.kind]}: ${job.done} of ${job.total}`, bar, stop);
      }));
      if (!jobs.length) footer.textContent = "Not for clinical use.";
    } catch (error) {
      footer.textContent = error.message;
    }
    await pause(700);
  }
}

// An element with properties and children.
export function h(name, properties = {}, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  for (const [key, value] of Object.entries(properties)) {
    if (key.startsWith("aria-") || key.startsWith("data-") || key === "role") element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}
