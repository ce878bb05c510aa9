const REFRESH = { least: 0.1, most: 5, usual: 0.25 };

/** What the user can choose under AsyncDiff; the server reads all but Refresh (asyncdiff_nodes/host/page/settings.py). */
export const SETTINGS = [
  {
    id: "AsyncDiff.Preset",
    category: ["AsyncDiff", "Sampling", "Preset"],
    name: "Preset",
    tooltip: "Used by samplers without an AsyncDiff Options node. The help of that node explains the presets.",
    type: "combo",
    options: ["Exact", "Balanced", "Fast", "Turbo"],
    defaultValue: "Balanced",
  },
  {
    id: "AsyncDiff.Devices",
    category: ["AsyncDiff", "Sampling", "Devices"],
    name: "Devices",
    tooltip: "The devices that auto stands for in the nodes. auto: all GPUs that ComfyUI sees, except much weaker ones. Or a list, such as cuda:0, cuda:2.",
    type: "text",
    defaultValue: "auto",
  },
  {
    id: "AsyncDiff.KeepMinutes",
    category: ["AsyncDiff", "Workers", "KeepMinutes"],
    name: "Keep workers warm (minutes)",
    tooltip:
      "How long the worker processes stay after the last picture, so that the next one starts at once. " +
      "0: until ComfyUI unloads its models.",
    type: "number",
    attrs: { min: 0, max: 1440, step: 1 },
    defaultValue: 0,
  },
  {
    id: "AsyncDiff.Links",
    category: ["AsyncDiff", "Workers", "Links"],
    name: "Links between GPUs",
    tooltip:
      "auto: GPUs exchange values directly where that works. host memory: always through the memory of the computer, for " +
      "machines whose direct links are known not to work, so that no start has to find that out. For workers that start from now on.",
    type: "combo",
    options: ["auto", "host memory"],
    defaultValue: "auto",
  },
  {
    id: "AsyncDiff.Unlisted",
    category: ["AsyncDiff", "Sampling", "Unlisted"],
    name: "Unlisted networks",
    tooltip:
      "Networks that this pack has no block list for. blocks found automatically: by what the network does in its first call; " +
      "two calls are compared with ComfyUI's own once. ComfyUI samples: on one GPU, as without this pack.",
    type: "combo",
    options: ["blocks found automatically", "ComfyUI samples"],
    defaultValue: "blocks found automatically",
  },
  {
    id: "AsyncDiff.Verify",
    category: ["AsyncDiff", "Sampling", "Verify"],
    name: "Verify",
    tooltip:
      "What auto stands for in the nodes. ComfyUI computes some calls of the network once more by itself, and compares. " +
      "first: one call of each kind, in the first picture of a model and what is attached to it. always: in every picture. " +
      "auto: as first, if code of another pack is attached to the model.",
    type: "combo",
    options: ["auto", "off", "first", "always"],
    defaultValue: "auto",
  },
  {
    id: "AsyncDiff.Refresh",
    category: ["AsyncDiff", "Panel", "Refresh"],
    name: "Panel refresh (seconds)",
    tooltip: "The shortest time between two updates of the AsyncDiff panel during a run.",
    type: "number",
    attrs: { min: REFRESH.least, max: REFRESH.most, step: 0.1, minFractionDigits: 1, maxFractionDigits: 2 },
    defaultValue: REFRESH.usual,
  },
];

/** A stored Refresh as the server takes it: settings can be edited by hand. */
export function refreshSeconds(stored) {
  const seconds = Number(stored) || REFRESH.usual;
  return Math.min(REFRESH.most, Math.max(REFRESH.least, seconds));
}
