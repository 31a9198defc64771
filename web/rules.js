/** Which inputs of a node its other inputs leave without effect. Values that come over a link are not known here. */

/**
 * @typedef {object} Inputs
 * @property {(name: string) => any} value a widget's value, undefined where it comes over a link
 * @property {(name: string) => boolean} linked whether something is connected
 */

/** @type {Record<string, (inputs: Inputs) => string[]>} */
const RULES = {
  BlockSwapWrapper: swapRules,
  BlockSwapWrapperWanVideo: (inputs) => [
    ...swapRules(inputs),
    ...(inputs.linked("plan") ? ["blocks_to_swap", "vace_blocks_to_swap"] : []),
  ],
  IntelligentVRAMNode(inputs) {
    const preset = inputs.value("preset");
    const named = preset !== undefined && preset !== "custom";
    return [
      ...(named ? ["auto_hardware_tuning", "vram_threshold_percent"] : []),
      ...(named || inputs.value("auto_hardware_tuning") === true ? ["num_cuda_streams", "bandwidth_target"] : []),
      ...(inputs.value("predict_for") === "the last run" ? ["width", "height", "num_frames"] : []),
      ...(inputs.linked("model") ? ["model_name"] : []),
    ];
  },
};

function swapRules(inputs) {
  if (inputs.linked("plan")) return ["max_vram_gb", "block_size_mb", "swap_mode"];
  return inputs.value("swap_mode") === "layerwise" ? ["block_size_mb"] : [];
}

/** Node classes of this pack that show their plan and result. */
export const CLASSES = Object.keys(RULES);

/**
 * Names of the inputs that have no effect at present.
 * @param {string} nodeClass
 * @param {Inputs} inputs
 * @returns {string[]}
 */
export function withoutEffect(nodeClass, inputs) {
  return RULES[nodeClass]?.(inputs) ?? [];
}
