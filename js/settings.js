const REFRESH = { least: 0.1, most: 5, usual: 0.25 };

/** What the user can choose under AsyncDiff; the server reads all but Refresh (asyncdiff_nodes/host/page/settings.py). */
export const SETTINGS = [
  {
    id: "AsyncDiff.Preset",
    category: ["AsyncDiff", "Sampling", "Preset"],
    name: "Preset",
    tooltip: "Of samplers without an AsyncDiff Options node.",
    type: "combo",
    options: ["Exact", "Balanced", "Fast", "Turbo"],
    defaultValue: "Balanced",
  },
  {
    id: "AsyncDiff.Devices",
    category: ["AsyncDiff", "Sampling", "Devices"],
    name: "Devices",
    tooltip: "What auto stands for. auto: every CUDA GPU. Or a list, one per rank, such as cuda:0, cuda:2.",
    type: "text",
    defaultValue: "auto",
  },
  {
    id: "AsyncDiff.KeepMinutes",
    category: ["AsyncDiff", "Workers", "KeepMinutes"],
    name: "Keep workers warm for, minutes",
    tooltip: "After the last picture. 0: until ComfyUI unloads its models.",
    type: "number",
    attrs: { min: 0, max: 1440, step: 1 },
    defaultValue: 0,
  },
  {
    id: "AsyncDiff.Verify",
    category: ["AsyncDiff", "Sampling", "Verify"],
    name: "Verify",
    tooltip:
      "Have ComfyUI compute a call of each kind as well, and compare. auto: as first, where something of another pack hangs on a model.",
    type: "combo",
    options: ["auto", "off", "first", "always"],
    defaultValue: "auto",
  },
  {
    id: "AsyncDiff.Refresh",
    category: ["AsyncDiff", "Panel", "Refresh"],
    name: "Panel refresh, seconds",
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
