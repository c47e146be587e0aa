// The page: its four views as tabs, and what is being worked on at the bottom.

import { get, h, shown, watchJobs } from "./api.js";
import { makeChange } from "./change.js";
import { makeLatents } from "./latents.js";
import { makeSample } from "./sample.js";
import { makeScans } from "./scans.js";

const tabs = [...document.querySelectorAll("[role=tab]")];
const header = document.getElementById("about");

function open(name, views) {
  for (const tab of tabs) {
    const chosen = tab.dataset.view === name;
    tab.setAttribute("aria-selected", chosen);
    tab.tabIndex = chosen ? 0 : -1;
    document.getElementById(tab.dataset.view).hidden = !chosen;
  }
  history.replaceState(null, "", `#${name}`);
  views[name]?.();
}

function channels(names) {
  const select = h("select", {}, ...names.map((name, value) => h("option", { value, textContent: name })));
  select.onchange = () => {
    shown.channel = Number(select.value);
    document.dispatchEvent(new Event("channel"));
  };
  return h("label", {}, "Channel", select);
}

try {
  const about = await get("/api/about");
  const million = (about.parameters / 1e6).toPrecision(2);
  header.textContent = `${about.ckpt} · ${about.shape.join(" × ")} voxels · ${million} million parameters · ${about.device}`;
  if (about.channels.length > 1) header.before(channels(about.channels));
  const section = (name) => document.getElementById(name);
  const views = {
    latents: makeLatents(section("latents"), about),
    sample: makeSample(section("sample"), about),
    change: makeChange(section("change"), about),
  };
  tabs.forEach((tab, place) => {
    tab.onclick = () => open(tab.dataset.view, views);
    tab.onkeydown = (event) => {
      const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (by) {
        const other = tabs[(place + by + tabs.length) % tabs.length];
        other.focus();
        other.click();
      }
    };
  });
  const asked = location.hash.slice(1);
  open(tabs.some((tab) => tab.dataset.view === asked) ? asked : "scans", views);
  await makeScans(section("scans"), about, (row) => { for (const view of Object.values(views)) view.select?.(row); });
  watchJobs(document.getElementById("jobs"));
} catch (error) {
  header.textContent = error.message;
}
