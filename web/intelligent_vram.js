/** What ComfyUI's front end loads: a sidebar tab, settings, and what our nodes show. */

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { make } from "./dom.js";
import { Feed } from "./feed.js";
import { setUnits } from "./format.js";
import { anyShown, dress, findNode, isOurs, refreshNodes, showResults } from "./nodes.js";
import { livePanel } from "./panel.js";
import { say, setLocale } from "./strings.js";

const TAB = "intelligent-vram";
const PANEL = "IntelligentVRAM.Panel";
const UNITS = "IntelligentVRAM.Units";
const THRESHOLD = "IntelligentVRAM.WarningThreshold";
const LOCALE = "Comfy.Locale";

let ready = false;
let registered = false;

/** What the user chose in the settings dialog. */
const chosen = { [PANEL]: true, [UNITS]: "GiB", [THRESHOLD]: 95 };

function showNode(id) {
  const node = findNode(app.rootGraph ?? app.graph, id);
  if (!node) return;
  app.canvas.selectNode?.(node);
  app.canvas.centerOnNode(node);
}

const panel = livePanel({ showNode, threshold: () => chosen[THRESHOLD] / 100 });
const panelFeed = new Feed(api, "panel", panel.update, panel.connection);
const nodeFeed = new Feed(api, "nodes", (results) => showResults(app.rootGraph ?? app.graph, results));

/** The tab is there if the user wants it. */
function placeTab() {
  const wanted = chosen[PANEL];
  if (!ready || wanted === registered) return;
  registered = wanted;
  if (!wanted) {
    app.extensionManager.unregisterSidebarTab(TAB);
    panelFeed.stop();
    return;
  }
  app.extensionManager.registerSidebarTab({
    id: TAB,
    icon: "pi pi-chart-bar",
    title: say("title"),
    tooltip: say("tab"),
    type: "custom",
    render(container) {
      container.append(panel.element);
      panelFeed.start();
    },
    destroy: () => panelFeed.stop(),
  });
}

/** Results are sent while there are nodes that show them. */
function followNodes() {
  if (!ready) return;
  if (anyShown() && chosen[PANEL]) nodeFeed.start();
  else nodeFeed.stop();
}

/** Language and units as they are now. */
function speak() {
  setLocale(app.extensionManager.setting.get(LOCALE) ?? "en");
  setUnits(chosen[UNITS]);
  panel.refresh();
  refreshNodes();
}

/** The user chose `value`; the front end tells before it keeps it. */
const choose = (id) => (value) => {
  chosen[id] = value ?? chosen[id];
  if (!ready) return;
  speak();
  placeTab();
  followNodes();
};

app.registerExtension({
  name: "IntelligentVRAM",
  settings: [
    {
      id: THRESHOLD,
      category: ["Intelligent VRAM", "Live panel", "Warning threshold"],
      name: "Warn when RAM or the card is fuller than (%)",
      tooltip: "Percent of RAM, or of the card's memory, from which on the live panel shows a warning.",
      type: "slider",
      attrs: { min: 80, max: 100, step: 1 },
      defaultValue: 95,
      onChange: choose(THRESHOLD),
    },
    {
      id: UNITS,
      category: ["Intelligent VRAM", "Live panel", "Units"],
      name: "Units of memory",
      tooltip: "GiB counts in powers of two, as ComfyUI does; GB in powers of ten, as makers of cards do.",
      type: "combo",
      options: ["GiB", "GB"],
      defaultValue: "GiB",
      onChange: choose(UNITS),
    },
    {
      id: PANEL,
      category: ["Intelligent VRAM", "Live panel", "Show"],
      name: "Show the live panel, and results on nodes",
      tooltip: "Off: no sidebar tab, and nothing is sent while a model samples.",
      type: "boolean",
      defaultValue: true,
      onChange: choose(PANEL),
    },
  ],
  setup() {
    document.head.append(make("link", { rel: "stylesheet", href: new URL("./style.css", import.meta.url).href }));
    app.ui.settings.addEventListener(`${LOCALE}.change`, () => setTimeout(speak));
    ready = true;
    speak();
    placeTab();
    followNodes();
  },
  nodeCreated(node) {
    if (isOurs(node)) dress(node, followNodes);
  },
});
