import { TO_ASYNCDIFF, TO_STOCK, replaceSamplers } from "./replace.js";

const REPLACE = {
  id: "AsyncDiff.ReplaceKSamplers",
  label: "Replace KSampler by AsyncDiff",
  icon: "pi pi-clone",
  types: TO_ASYNCDIFF,
  done: "now sampled by all devices",
  none: "no KSampler or KSampler (Advanced)",
};
const RESTORE = {
  id: "AsyncDiff.RestoreKSamplers",
  label: "Replace AsyncDiff by KSampler",
  icon: "pi pi-undo",
  types: TO_STOCK,
  done: "back",
  none: "no",
};

/** Commands */
export function commands(app) {}
