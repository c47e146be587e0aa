// Scans: the cohort as a table, and the one that is chosen with what the network makes of it.

import { get, h, run, shown } from "./api.js";
import { Viewer } from "./viewer.js";

const PAGE = 50;
const COLUMNS = {
  image: "scan", bits_per_dim: "bits per dim", bits_per_dim_population: "population", anomaly_score: "anomaly (sd)",
  unfamiliarity: "unfamiliar",
  typicality: "typicality distance", typicality_tail: "share as far", psnr: "PSNR (dB)", ssim: "SSIM", trained_on: "trained on",
};

const TITLES = {
  bits_per_dim_population: "Bits per dim under the population prior", anomaly_score: "99.9th percentile of the anomaly map, in standard deviations",
  unfamiliarity: "Distance from what is usual in training, over its limit: the network does not know scans above 1",
  typicality: "Mahalanobis distance from the cohort's mean", typicality_tail: "Share of the cohort's scans that lie at least as far from its mean",
};

// Why a scan cannot be read, without its path, which its row has already.
const reason = (error) => error.replace(/^'[^']*':? /, "");

export function makeScans(section, about, select) {
  const state = { offset: 0, sort: "", descending: false, search: "", chosen: null, row: null };
  const message = h("p", { className: "message", role: "alert" });
  const counts = h("span", { className: "quiet" });
  const search = h("input", { type: "search", placeholder: "Search by name, subject, site …", ariaLabel: "Search" });
  const table = h("table");
  const previous = h("button", { textContent: "‹", ariaLabel: "Previous page", onclick: () => turn(-PAGE) });
  const next = h("button", { textContent: "›", ariaLabel: "Next page", onclick: () => turn(PAGE) });
  const score = h("button", { textContent: "Score all", title: "Likelihood and anomaly scores of every scan", onclick: scoreAll });
  const level = h("input", { type: "range", min: 0, max: about.levels.length - 1, step: 1, value: about.levels.length - 1, ariaLabel: "Levels" });
  const levelName = h("output");
  const side = h("div", { className: "side" }, h("div", { className: "row" }, search, score),
    h("div", { className: "table", tabIndex: -1 }, table), h("div", { className: "row" }, previous, next, counts));
  const facts = h("div", { className: "row quiet" });
  const levels = h("label", { hidden: true }, "Levels of the reconstruction, from the coarsest grid to all", level, levelName);
  const stage = h("div", { className: "stage" }, message, facts);
  section.append(side, stage);
  const viewer = new Viewer(stage, "The scan that is chosen is shown here, with what is unusual in it; the crosshair stands where that is most.");
  stage.append(levels);

  let waiting = null, stop = null;
  const pictures = new Map(); // of the rows that are shown
  search.oninput = () => { state.search = search.value; state.offset = 0; refresh(); };
  level.oninput = () => {
    const { key, name } = about.levels[level.value];
    levelName.textContent = Number(level.value) === about.levels.length - 1 ? "all" : `to ${name}`;
    viewer.base.value = `recon_to${key}`;
    viewer.redraw();
  };
  viewer.base.addEventListener("change", levelOf);

  function levelOf() {
    const place = about.levels.findIndex(({ key }) => viewer.base.value === `recon_to${key}`);
    level.value = place < 0 ? about.levels.length - 1 : place;
    levelName.textContent = place < 0 || place === about.levels.length - 1 ? "all" : `to ${about.levels[place].name}`;
  }

  function turn(by) {
    state.offset = Math.max(0, state.offset + by);
    refresh();
  }

  // A picture that cannot be made is a scan that cannot be read: its row will say why.
  function soon() {
    clearTimeout(waiting);
    waiting = setTimeout(refresh, 300);
  }

  // A picture that is no longer shown need not be made any more.
  function drop(index) {
    Object.assign(pictures.get(index), { onerror: null, src: "" });
    pictures.delete(index);
  }

  async function refresh() {
    const query = new URLSearchParams({ offset: state.offset, limit: PAGE, sort: state.sort, descending: state.descending, search: state.search });
    try {
      draw(await get(`/api/scans?${query}`));
    } catch (error) {
      message.textContent = error.message;
    }
  }

  function draw(page) {
    for (const index of [...pictures.keys()]) if (!page.rows.some((row) => row.index === index && !row.error)) drop(index);
    const { index: focus, column } = document.activeElement?.dataset ?? {};
    const heads = page.columns.map((name) => {
      const mark = state.sort === name ? (state.descending ? " ↓" : " ↑") : "";
      const button = h("button", { textContent: (COLUMNS[name] ?? name) + mark, title: TITLES[name] ?? "", "data-column": name, onclick: () => sort(name) });
      return h("th", { scope: "col" }, button);
    });
    table.replaceChildren(h("thead", {}, h("tr", {}, h("th"), ...heads)), h("tbody", {}, ...page.rows.map((row) => line(row, page.columns))));
    const last = Math.min(state.offset + page.rows.length, page.total);
    counts.textContent = !page.total ? `No scan of ${page.scans} has “${state.search}” in its row.` : `${state.offset + 1} to ${last} of ${page.total}; ${page.scored} scored` +
      (page.broken ? `; ${page.broken} cannot be read` : "");
    previous.disabled = state.offset === 0;
    next.disabled = last >= page.total;
    if (focus !== undefined) table.querySelector(`tr[data-index="${focus}"]`)?.focus();
    if (column !== undefined) [...table.querySelectorAll("th button")].find((head) => head.dataset.column === column)?.focus();
  }

  function line(row, columns) {
    if (!row.error && !pictures.has(row.index)) {
      pictures.set(row.index, h("img", { loading: "lazy", alt: "", src: `/api/scans/${row.index}/thumbnail.png?channel=${shown.channel}`, onerror: soon }));
    }
    const picture = row.error ? "" : pictures.get(row.index);
    const cells = row.error
      ? [h("td", { textContent: row.image }), h("td", { className: "error", colSpan: Math.max(1, columns.length - 1) }, h("div", { textContent: reason(row.error), title: row.error }))]
      : columns.map((name) => cell(row[name]));
    const element = h("tr", {
      tabIndex: 0, "data-index": row.index, "aria-selected": row.index === state.chosen, onclick: () => choose(row),
      onkeydown: (event) => {
        if (event.key === "Enter") choose(row);
        if (event.key === "ArrowDown") { event.preventDefault(); element.nextSibling?.focus(); }
        if (event.key === "ArrowUp") { event.preventDefault(); element.previousSibling?.focus(); }
      },
    }, h("td", {}, picture), ...cells);
    return element;
  }

  function cell(value) {
    if (typeof value !== "number") return h("td", { textContent: value ?? "" });
    return h("td", { className: "number", textContent: Number.isInteger(value) ? value : value.toFixed(Math.abs(value) < 10 ? 3 : 1) });
  }

  function sort(name) {
    if (state.sort === name) state.descending = !state.descending;
    else Object.assign(state, { sort: name, descending: name !== "image" });
    state.offset = 0;
    refresh();
  }

  async function choose(row) {
    state.chosen = row.index;
    state.row = row;
    for (const other of table.querySelectorAll("tbody tr")) other.setAttribute("aria-selected", other.dataset.index === String(row.index));
    message.textContent = "";
    facts.textContent = `Opening ${row.image} …`;
    stop?.abort();
    const mine = (stop = new AbortController());
    try {
      const job = await run("view", { index: row.index }, { signal: mine.signal });
      if (mine.signal.aborted) return;
      if (!job) {
        facts.textContent = "Cancelled.";
        return;
      }
      await open(job);
      select(job.result.row);
    } catch (error) {
      if (mine.signal.aborted) return;
      message.textContent = error.message;
      viewer.element.hidden = levels.hidden = true;
      facts.textContent = "";
    }
    refresh();
  }

  async function open({ result, files }) {
    const row = result.row;
    const shares = row.typicality_tail === undefined ? "" : `, ${(100 * row.typicality_tail).toFixed(0)} % of the cohort as far from its mean`;
    message.textContent = row.unfamiliarity > 1 ? `The network does not know such scans (${row.unfamiliarity.toFixed(1)} times ` +
      "the limit), so that nothing here means much: python -m scripts.check with --ckpt says why." : "";
    facts.textContent = `${row.bits_per_dim.toFixed(3)} bits per dim, anomaly score ${row.anomaly_score.toFixed(1)} standard deviations, ` +
      `PSNR ${row.psnr.toFixed(1)} dB${shares}`;
    const file = (name) => files[`${name}.nii.gz`];
    const recons = about.levels.map(({ key, name }, place) => ({
      name: `recon_to${key}`, file: file(`recon_to${key}`),
      label: place === about.levels.length - 1 ? "reconstruction" : `to ${name}`,
    }));
    const sd = { signed: true, most: 6, from: 3, unit: "standard deviations, blue darker, orange brighter" };
    const most = Math.max(result.largest_scale, 1e-4);
    await viewer.show({
      caption: row.image, file: row.image,
      bases: [{ name: "scan", label: "scan", file: file("scan") }, ...recons.reverse(), { name: "restored", label: "restored", file: file("restored") }],
      overlays: [
        { name: "anomaly", label: "anomaly", file: file("anomaly"), ...sd },
        { name: "zscore", label: "z score", file: file("zscore"), ...sd },
        ...deviation(row.index, sd),
        { name: "scale", label: "predicted deviation", file: file("scale"), signed: false, most, text: most.toFixed(3), from: most / 10, unit: "standard deviation, in intensity" },
      ],
      overlay: viewer.overlays.length ? undefined : "anomaly", place: result.peak,
    });
    levels.hidden = false;
    levelOf();
  }

  // Made when it is chosen: it takes some draws.
  function deviation(index, style) {
    if (!about.covariates.length) return [];
    let said = false;
    const load = (name, unit) => async (signal, onProgress) => {
      const job = await run("deviation", { index }, { signal, onProgress });
      if (!job) return null;
      const found = job.result.certificate;
      if (found && !said && state.chosen === index) facts.textContent += `. ${certificate(found)}`;
      said = true;
      const known = Object.entries(job.result.known).map(([name, value]) => `${name} ${value}`).join(", ");
      return { file: job.files[`${name}.nii.gz`], unit: `${unit}; beside ${known ? `people of ${known}` : "the whole cohort"}` };
    };
    const significant = { ...style, name: "significant", label: "significant clusters", most: 3, from: 0.1 };
    return [
      { ...style, name: "deviation", label: `deviation for ${about.covariates.map(({ name }) => name).join(", ")}`, load: load("deviation", style.unit), from: 2 },
      ...(about.certified ? [{ ...significant, load: load("significant", "−log10 p, blue darker, orange brighter") }] : []),
    ];
  }

  function certificate({ guarantee, findings }) {
    const clusters = findings.filter(({ kind }) => kind === "cluster").slice(0, 3).map((found) => `${found.direction}, ${found.size_ml.toFixed(1)} ml, p ${found.p.toPrecision(2)}`);
    return `Largest clusters: ${clusters.join("; ") || "none"}. ${guarantee}`;
  }

  async function scoreAll() {
    score.disabled = true;
    message.textContent = "";
    const timer = setInterval(refresh, 1500);
    try {
      await run("score", {});
    } catch (error) {
      message.textContent = error.message;
    }
    clearInterval(timer);
    score.disabled = false;
    refresh();
  }

  document.addEventListener("channel", () => {
    for (const index of [...pictures.keys()]) drop(index);
    return state.row ? choose(state.row) : refresh();
  });
  facts.textContent = "Choose a scan: click on its row, or press Enter on it.";
  return refresh();
}
