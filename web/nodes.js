/** What a node shows of its plan and of its last run, and inputs greyed out that have no effect. */

import { compactStrip } from "./charts.js";
import { make, setAttribute, setText } from "./dom.js";
import { bytes, seconds } from "./format.js";
import { CLASSES, withoutEffect } from "./rules.js";
import { say } from "./strings.js";

const HEIGHT = 92;
const WIDGET = "intelligent_vram";
const shown = new Map();

/** @param {object} node @returns {boolean} whether it is one that shows its plan */
export const isOurs = (node) => CLASSES.includes(node.comfyClass);

/** @returns {boolean} whether any such node is in a graph */
export const anyShown = () => shown.size > 0;

/** A strip, three figures, and a word on what they are. */
function result() {
  const word = make("span", { class: "ivram-node-word" });
  const strip = make("div", { class: "ivram-node-strip" });
  const values = ["peakOfLimit", "stepOfFloor", "streamedAStep"].map((name) => {
    const label = make("span");
    const value = make("b", { "data-figure": name });
    return { name, label, value, element: make("div", {}, value, label) };
  });
  const list = make("div", { class: "ivram-node-figures" }, ...values.map((part) => part.element));
  const element = make("div", { class: "ivram ivram-node", role: "group" }, word, strip, list);
  let last = null;

  function refresh() {
    const figures = last?.figures;
    const state = !last ? "noRun" : last.planned ? "planned" : last.running ? "running" : "lastRun";
    setText(word, say(last && last.planned && !figures ? "notPredicted" : state));
    setAttribute(element, "data-state", state);
    setAttribute(element, "aria-label", `${say("title")}: ${word.textContent}`);
    strip.replaceChildren(...compactStrip(last?.strip ?? ""));
    strip.hidden = !last?.strip;
    list.hidden = !figures;
    if (!figures) return;
    const pair = (one, other, tell) => `${one ? tell(one) : "-"} / ${tell(other)}`;
    const texts = {
      peakOfLimit: pair(figures.peak, figures.limit, bytes),
      stepOfFloor: pair(figures.seconds, figures.floor, seconds),
      streamedAStep: bytes(figures.streamed),
    };
    for (const { name, label, value } of values) {
      setText(label, say(name));
      setText(value, texts[name]);
      setAttribute(value, "title", `${say(name)}: ${texts[name]}`);
    }
  }

  refresh();
  return {
    element,
    refresh,
    update(now) {
      last = now;
      refresh();
    },
  };
}

/**
 * Call a function after a method of an object, which may not have it.
 * @param {object} object
 * @param {string} method
 * @param {(...args: any[]) => void} after
 */
function follow(object, method, after) {
  const before = object[method];
  object[method] = function (...args) {
    const answer = before?.apply(this, args);
    after(...args);
    return answer;
  };
}

/** Grey out what has no effect. Values stay as they are, and count again when they have one. */
function disable(node) {
  const slot = (name) => node.inputs?.find((input) => (input.widget?.name ?? input.name) === name);
  const linked = (name) => slot(name)?.link != null;
  const value = (name) => (linked(name) ? undefined : node.widgets?.find((widget) => widget.name === name)?.value);
  const idle = new Set(withoutEffect(node.comfyClass, { value, linked }));
  let changed = false;
  for (const widget of node.widgets ?? []) {
    if (widget.name === WIDGET || Boolean(widget.disabled) === idle.has(widget.name)) continue;
    widget.disabled = idle.has(widget.name);
    changed = true;
  }
  if (changed) node.graph?.setDirtyCanvas?.(true, true);
}

/** Room for all widgets, in a node that was saved with fewer of them too. */
function grow(node) {
  const least = node.computeSize()[1];
  if (node.size[1] < least) node.setSize([node.size[0], least]);
}

/**
 * Let a new node of this pack show its plan and its result.
 * @param {object} node
 * @param {() => void} changed is told when there are more or fewer such nodes
 */
export function dress(node, changed) {
  const part = result();
  const widget = node.addDOMWidget(WIDGET, WIDGET, part.element, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => HEIGHT,
    getMaxHeight: () => HEIGHT,
  });
  widget.serialize = false;
  const update = () => disable(node);
  for (const other of node.widgets) if (other !== widget) follow(other, "callback", update);
  follow(node, "onConnectionsChange", () => queueMicrotask(update));
  follow(node, "onConfigure", () => {
    grow(node);
    update();
  });
  follow(node, "onExecuted", (output) => {
    const planned = output?.intelligent_vram?.[0];
    if (planned) part.update({ ...planned, planned: true });
  });
  follow(node, "onAdded", () => {
    shown.set(node, part);
    changed();
  });
  follow(node, "onRemoved", () => {
    shown.delete(node);
    changed();
  });
  if (node.graph) shown.set(node, part);
  grow(node);
  update();
}

/**
 * The node that ComfyUI calls `id` while it runs: ids of subgraph nodes lead the way, joined by colons.
 * @param {object} graph the root graph
 * @param {string} id
 * @returns {object | undefined}
 */
export function findNode(graph, id) {
  let node;
  for (const step of String(id).split(":")) {
    node = graph?.getNodeById(Number.isNaN(Number(step)) ? step : Number(step));
    graph = node?.subgraph;
  }
  return node ?? undefined;
}

/**
 * Show results by node id.
 * @param {object} graph the root graph
 * @param {Record<string, object>} results
 */
export function showResults(graph, results) {
  for (const [id, now] of Object.entries(results)) shown.get(findNode(graph, id))?.update(now);
}

/** Language or units changed. */
export function refreshNodes() {
  for (const part of shown.values()) part.refresh();
}
