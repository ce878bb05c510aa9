/** Texts of the panel and of toasts in English; other languages are in locales/LANGUAGE/main.json under "asyncdiff". */
export const ENGLISH = {
  idle: "Nothing has run yet. Run a workflow that has an AsyncDiff sampler.",
  starting: "Starting the worker processes",
  sampling: "Sampling",
  usual: "ComfyUI samples as usual",
  done: "Last run",
  cancelled: "Last run, cancelled",
  failed: "Last run, failed",
  step: "step {step} of {steps}",
  synchronous: "synchronous",
  asynchronous: "asynchronous",
  waiting: "waiting",
  synchronousHint: "The devices wait for each other",
  asynchronousHint: "All devices compute at once",
  waitingHint: "The device waits for a value from another one",
  computing: "computing",
  ready: "ready",
  rank: "Rank {rank} · {device}",
  segment: "segment {segment}",
  branch: "branch {branch}",
  laneHint: "A rank is the worker process of one device. It computes a segment: a part of the network.",
  branches: "{count} branches that share the batch",
  perStep: "seconds per step",
  perStepHint: "The latest step. Sequential: all segments one after the other, as on one device.",
  sequential: "sequential {value}",
  speedup: "speed-up",
  speedupHint: "How many times as fast as sequential an asynchronous step is. Whole run: the warm-up included.",
  soFar: "whole run so far {value}",
  wholeRun: "whole run {value}",
  sent: "MiB per step",
  sentBetween: "between devices",
  sentHint: "How much all devices together send to each other in one step",
  drift: "drift",
  driftHint: "How much the values that are sent change from step to step. The less, the closer the picture is to KSampler's.",
  memory: "{used} of {total} GiB",
  plan: "{devices}: {segments}",
  planHint: "A segment is the part of the network that one device computes. Some work is done twice, so shares may exceed 100%.",
  owns: "segment {segment} computes {begins} to {ends} ({share} of the work)",
  replicas: "the last segment runs on {count} devices",
  workers: "Workers running on {devices}",
  noWorkers: "No workers running",
  devices: "Devices: {devices}",
  noDevices: "ComfyUI sees no GPU that workers can use",
  stop: "Stop workers",
  stopHint: "Ends the idle worker processes and frees their memory",
  stopped: "Workers stopped",
  away: "The server does not answer",
  copy: "Copy report",
  copied: "Report copied",
  copyByHand: "The browser does not allow copying here. Copy the text below.",
  timeline: "Timeline: when each rank was computing",
  replaced: "{count} samplers replaced. Press Ctrl+Z to undo.",
  replacedOne: "{count} sampler replaced. Press Ctrl+Z to undo.",
  noStock: "There is no KSampler or KSampler (Advanced) {where}. {cure}",
  noOurs: "There is no KSampler (AsyncDiff) or KSampler Advanced (AsyncDiff) {where}. {cure}",
  inSelection: "in the selection",
  inGraph: "in this workflow",
  selectOthers: "Select other nodes, or clear the selection to replace all.",
  otherSamplers: "For other samplers, put AsyncDiff Model between the model and the sampler.",
  otherModel: "To do without AsyncDiff Model, connect the sampler directly to the model, or bypass the node.",
};

let texts = ENGLISH;

/** Use `translated` texts where there are some. */
export function translate(translated) {
  texts = { ...ENGLISH, ...translated };
}

/** The text `key` with its {values}. */
export function t(key, values = {}) {
  return texts[key].replace(/\{(\w+)\}/g, (_, name) => values[name]);
}
