/** The live panel: memory by use, the blocks of each model, its times, warnings and the last runs. */

import { blockStrip, stackedBar, stepColumns } from "./charts.js";
import { keep, make, setAttribute, setText } from "./dom.js";
import { bytes, clock, percent, seconds, speed } from "./format.js";
import { say } from "./strings.js";

/**
 * @param {object} state what the server tells of a device
 * @returns {object} see stackedBar
 */
function deviceBar(state) {
  const part = (kind, value) => ({ kind, label: say(kind), value });
  return {
    title: state.host ? say("cpuMemory") : `${say("vram")}, ${state.name}`,
    total: state.total,
    limit: state.limit,
    parts: [
      part("resident", state.resident + state.beside),
      part("slots", state.slots),
      part("rest", state.rest),
      part("others", state.others),
      part("free", state.free),
    ],
  };
}

function ramBar(ram) {
  const part = (kind, label, value) => ({ kind, label: say(label), value });
  return {
    title: say("ram"),
    total: ram.total,
    parts: [
      part("packed", "packed", ram.locked),
      part("packed-plain", "packedPlain", ram.packed - ram.locked),
      part("process", "process", ram.process),
      part("others", "others", ram.others),
      part("free", "free", ram.free),
    ],
  };
}

/** A figure with its name, and a second line under it. */
function figure(name) {
  const label = make("dt");
  const value = make("dd", { class: "ivram-figure-value", "data-figure": name });
  const more = make("dd", { class: "ivram-figure-more" });
  const element = make("div", { class: "ivram-figure" }, label, value, more);
  return {
    element,
    update(text, further) {
      setText(label, say(name));
      setAttribute(element, "title", say(`${name}Hint`));
      setText(value, text);
      setText(more, further);
    },
  };
}

/** @param {(node: string) => void} showNode */
function modelPart(showNode) {
  return (first) => {
    const name = make("h4");
    const show = make("button", { type: "button", class: "ivram-button" });
    const head = make("div", { class: "ivram-model-head" }, name, show);
    const strip = blockStrip();
    const figures = Object.fromEntries(["step", "floor", "stall", "link", "lossless"].map((key) => [key, figure(key)]));
    const list = make("dl", { class: "ivram-figures" }, ...Object.values(figures).map((part) => part.element));
    const columns = stepColumns();
    const element = make("section", { class: "ivram-model" }, head, strip.element, list, columns.element);
    let node = first.node;
    show.addEventListener("click", () => showNode(node));

    function update(model) {
      node = model.node;
      setText(name, model.node === null ? model.model : `${model.model}, ${say("node", { id: model.node })}`);
      setText(show, say("showNode"));
      show.hidden = model.node === null;
      strip.update(model);
      const now = model.figures;
      list.hidden = now === null;
      columns.update(model.steps, now?.floor ?? 0);
      if (now === null) return;
      figures.step.update(seconds(now.seconds), say("forwards", { count: model.forwards }));
      const times = now.floor > 0 ? (now.seconds / now.floor).toFixed(2) : "";
      figures.floor.update(seconds(now.floor), times && say("overFloor", { times }));
      figures.stall.update(seconds(now.stall), percent(now.seconds ? now.stall / now.seconds : 0));
      const link = now.link ? say("measured", { speed: speed(now.link) }) : "";
      figures.link.update(now.streamed ? speed(now.rate) : "-", now.streamed ? link : say("nothingStreamed"));
      figures.lossless.element.hidden = !now.encoded;
      const sizes = { encoded: bytes(now.encoded), decoded: bytes(now.decoded) };
      figures.lossless.update(say("encodedOf", sizes), say("decodedIn", { time: seconds(now.decoding) }));
    }
    return { element, update };
  };
}

/** @param {(node: string) => void} showNode */
function devicePart(showNode) {
  return () => {
    const bar = stackedBar();
    const models = make("div");
    const element = make("section", { class: "ivram-device" }, bar.element, models);
    const create = modelPart(showNode);
    return {
      element,
      update(state) {
        setAttribute(element, "data-device", state.device);
        bar.update(deviceBar(state));
        keep(models, state.models, (model) => String(model.number), create);
      },
    };
  };
}

function warningPart() {
  const element = make("li");
  return {
    element,
    update(warning) {
      const values = {
        device: warning.device,
        share: percent(warning.share ?? 0),
        bytes: bytes(warning.bytes ?? 0),
        count: warning.count,
      };
      const text = say(`warn_${warning.what}`, values);
      const named = !warning.several || warning.device === undefined || text.includes(warning.device);
      setText(element, named ? text : say("onDevice", { device: warning.device, text }));
    },
  };
}

const COLUMNS = [
  ["when", (run) => clock(run.when)],
  ["step", (run) => seconds(run.figures.seconds)],
  ["floor", (run) => seconds(run.figures.floor)],
  ["streamed", (run) => bytes(run.figures.streamed)],
  ["peak", (run) => (run.figures.peak ? bytes(run.figures.peak) : "")],
];

function runPart() {
  const cells = COLUMNS.map(([name]) => make(name === "when" ? "th" : "td", name === "when" ? { scope: "row" } : {}));
  const element = make("tr", {}, ...cells);
  return {
    element,
    update(run) {
      COLUMNS.forEach(([, tell], index) => setText(cells[index], tell(run)));
      setAttribute(element, "data-prompt", run.prompt ?? "");
      const node = run.node === null ? "" : `, ${say("node", { id: run.node })}`;
      const words = [`${run.model}${node}`, run.device, say("forwards", { count: run.figures.forwards })];
      setAttribute(element, "title", words.join(", "));
    },
  };
}

function historyTable() {
  const heads = COLUMNS.map(() => make("th", { scope: "col" }));
  const body = make("tbody");
  const table = make("table", {}, make("thead", {}, make("tr", {}, ...heads)), body);
  const element = make("div", { class: "ivram-history", tabindex: "0", role: "region" }, table);
  return {
    element,
    update(runs) {
      COLUMNS.forEach(([name], index) => setText(heads[index], say(name)));
      setAttribute(element, "aria-label", say("history"));
      element.hidden = runs.length === 0;
      keep(body, runs, (run) => `${run.when} ${run.node}`, runPart);
    },
  };
}

/**
 * Makes the panel.
 * @param {{showNode: (node: string) => void, threshold: () => number}} host `threshold`: from which share of RAM or of the
 *   card on they count as full
 * @returns {{element: HTMLElement, update: (state: object) => void, connection: (there: boolean) => void,
 *   refresh: () => void}} `refresh` after language, units or threshold changed
 */
export function livePanel({ showNode, threshold }) {
  const title = make("h2");
  const status = make("span", { class: "ivram-status", role: "status", "aria-live": "polite" });
  const warningList = make("ul", { class: "ivram-warnings", "aria-live": "polite" });
  const devices = make("div");
  const empty = make("div", { class: "ivram-empty" }, make("p"), make("p"));
  const ram = stackedBar();
  const historyTitle = make("h3");
  const noHistory = make("p", { class: "ivram-note" });
  const history = historyTable();
  const element = make(
    "div",
    { class: "ivram ivram-panel", "data-state": "waiting" },
    make("header", {}, title, status),
    warningList,
    devices,
    empty,
    make("section", {}, ram.element),
    make("section", {}, historyTitle, noHistory, history.element),
  );
  const createDevice = devicePart(showNode);
  let last = null;
  let connected = true;

  function refresh() {
    const models = last?.devices.flatMap((device) => device.models) ?? [];
    const mode = !connected ? "lost" : last === null ? "waiting" : models.some((m) => m.computing) ? "live" : "idle";
    setText(title, say("title"));
    setText(status, say(mode));
    setAttribute(element, "data-state", mode);
    setText(empty.children[0], say("empty"));
    setText(empty.children[1], say("emptyHint"));
    setText(historyTitle, say("history"));
    setText(noHistory, say("noHistory"));
    empty.hidden = last === null || models.length > 0;
    noHistory.hidden = last === null || last.runs.length > 0;
    historyTitle.hidden = ram.element.hidden = last === null;
    if (last === null) return;
    const full = threshold();
    const several = last.devices.length > 1;
    const due = last.warnings
      .filter(({ what, share }) => !what.endsWith("_full") || share >= full)
      .map((warning) => ({ ...warning, several }));
    warningList.hidden = due.length === 0;
    keep(warningList, due, (warning) => `${warning.what} ${warning.device} ${warning.model}`, warningPart);
    const shown = last.devices.filter((device) => !device.host || device.models.length > 0);
    keep(devices, shown, (device) => device.device, createDevice);
    ram.update(ramBar(last.ram));
    history.update(last.runs);
  }

  refresh();
  return {
    element,
    refresh,
    update(state) {
      last = state;
      refresh();
    },
    connection(there) {
      if (there === connected) return;
      connected = there;
      refresh();
    },
  };
}
