/** Stacked bars with a legend, the strip of blocks, and a line of step times. Each is made once and updated in place. */

import { keep, make, setAttribute, setText } from "./dom.js";
import { bytes, seconds } from "./format.js";
import { say } from "./strings.js";

/**
 * A stacked bar with a legend.
 * @returns {{element: Element, update: (bar: {title: string, total: number, parts: {kind: string, label: string,
 *   value: number}[], limit?: number | null}) => void}} values in bytes; `limit` is marked on the bar
 */
export function stackedBar() {
  const title = make("span", { class: "ivram-bar-title" });
  const total = make("span", { class: "ivram-bar-total" });
  const segments = make("div", { class: "ivram-segments" });
  const mark = make("div", { class: "ivram-limit" });
  const track = make("div", { class: "ivram-track", role: "img" }, segments, mark);
  const legend = make("ul", { class: "ivram-legend" });
  const element = make("div", { class: "ivram-bar" }, make("div", { class: "ivram-bar-head" }, title, total), track, legend);

  function update(bar) {
    const whole = Math.max(1, bar.total);
    const parts = bar.parts.filter((part) => part.value > 0 || part.kind === "free");
    const used = parts.reduce((sum, part) => sum + (part.kind === "free" ? 0 : part.value), 0);
    setText(title, bar.title);
    setText(total, say("of", { part: bytes(used), whole: bytes(bar.total) }));
    keep(segments, parts, (part) => part.kind, segment);
    for (const part of parts) segments.ivramParts.get(part.kind).element.style.flexGrow = String(part.value / whole);
    keep(legend, parts, (part) => part.kind, legendEntry);
    const limited = bar.limit != null && bar.limit > 0 && bar.limit < bar.total;
    mark.hidden = !limited;
    if (limited) {
      mark.style.insetInlineStart = `${(100 * bar.limit) / whole}%`;
      setAttribute(mark, "title", `${say("limit")}: ${bytes(bar.limit)}`);
    }
    const words = parts.map((part) => `${part.label} ${bytes(part.value)}`);
    if (bar.limit) words.push(`${say("limit")} ${bytes(bar.limit)}`);
    setAttribute(track, "aria-label", `${bar.title}: ${words.join(", ")}`);
  }
  return { element, update };
}

const segment = (part) => ({
  element: make("div", { class: `ivram-segment ivram-${part.kind}` }),
  update: () => {},
});

function legendEntry(part) {
  const label = make("span", { class: "ivram-label" });
  const value = make("span", { class: "ivram-value" });
  const swatch = make("span", { class: `ivram-swatch ivram-${part.kind}`, "aria-hidden": "true" });
  return {
    element: make("li", { "data-kind": part.kind }, swatch, label, value),
    update(now) {
      setText(label, now.label);
      setText(value, bytes(now.value));
      setAttribute(value, "data-value", String(now.value));
    },
  };
}

/** States of a unit that a legend names, as letters of the strip. */
const STATES = ["r", "s", "f", "c", "x"];

/**
 * The model's blocks in order; a block of several units is divided.
 * @returns {{element: Element, update: (model: {strip: string, planned: string, blocks: number[]}) => void}}
 */
export function blockStrip() {
  const cells = make("div", { class: "ivram-blocks", role: "img" });
  const legend = make("ul", { class: "ivram-legend ivram-legend-line" });
  const words = make("p", { class: "ivram-note" });
  const element = make("div", { class: "ivram-strip" }, cells, legend, words);
  let shape = "";
  let units = [];
  let shown = "";

  function build(blocks) {
    cells.replaceChildren();
    units = blocks.map((block) => Object.assign(make("i"), { block }));
    let most = 1;
    for (let first = 0; first < units.length; ) {
      let last = first + 1;
      while (last < units.length && blocks[last] === blocks[first] && blocks[first] >= 0) last += 1;
      most = Math.max(most, last - first);
      cells.append(make("span", { class: "ivram-block" }, ...units.slice(first, last)));
      first = last;
    }
    cells.style.setProperty("--ivram-cell", `${Math.min(60, Math.max(10, 4 * most))}px`);
    shown = "";
  }

  function update({ strip, blocks, planned }) {
    if (shape !== blocks.join()) {
      shape = blocks.join();
      build(blocks);
    }
    for (let index = 0; index < units.length; index += 1) {
      if (shown[index] === strip[index]) continue;
      units[index].className = `ivram-state-${strip[index]}`;
    }
    shown = strip;
    const resident = [...planned].filter((state) => state === "r").length;
    const counts = { units: planned.length, streamed: planned.length - resident, resident };
    keep(legend, STATES, (state) => state, stateEntry);
    setText(words, say("unitsWords", counts));
    setAttribute(cells, "aria-label", `${say("blocks")}: ${words.textContent}`);
  }

  cells.addEventListener("mouseover", ({ target }) => {
    const index = units.indexOf(target);
    if (index < 0) return;
    const name = target.block < 0 ? say("outside") : say("block", { number: target.block });
    target.title = `${name}: ${say(`state_${shown[index]}`)}`;
  });
  return { element, update };
}

function stateEntry(state) {
  const label = make("span", { class: "ivram-label" });
  const swatch = make("span", { class: `ivram-swatch ivram-state-${state}`, "aria-hidden": "true" });
  return { element: make("li", {}, swatch, label), update: () => setText(label, say(`state_${state}`)) };
}

/**
 * The times of the last steps as columns, with the floor as a line.
 * @returns {{element: Element, update: (steps: number[], floor: number) => void}} seconds
 */
export function stepColumns() {
  const columns = make("div", { class: "ivram-columns", role: "img" });
  const floorLine = make("div", { class: "ivram-floor" });
  const element = make("div", { class: "ivram-steps" }, columns, floorLine);

  function update(steps, floor) {
    const most = Math.max(...steps, floor, 1e-9);
    element.hidden = steps.length === 0;
    while (columns.children.length > steps.length) columns.lastChild.remove();
    while (columns.children.length < steps.length) columns.append(make("i"));
    steps.forEach((step, index) => {
      columns.children[index].style.height = `${(100 * step) / most}%`;
    });
    floorLine.hidden = !floor;
    floorLine.style.bottom = `${(100 * floor) / most}%`;
    floorLine.title = `${say("floor")}: ${seconds(floor)}`;
    if (!steps.length) return;
    const span = { count: steps.length, low: seconds(Math.min(...steps)), high: seconds(Math.max(...steps)) };
    setAttribute(columns, "aria-label", say("stepsLabel", span));
    columns.title = say("stepsLabel", span);
  }
  return { element, update };
}

/**
 * A plan in one line, without names.
 * @param {string} strip states of units
 * @returns {HTMLElement[]}
 */
export function compactStrip(strip) {
  const runs = strip.match(/(.)\1*/g) ?? [];
  return runs.map((run) => {
    const part = make("i", { class: `ivram-state-${run[0]}` });
    part.style.flexGrow = String(run.length);
    return part;
  });
}
