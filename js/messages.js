/** Texts of the panel and of toasts in English; other languages are in locales/LANGUAGE/main.json under "asyncdiff". */
export const ENGLISH = {
  idle: "No run yet. Queue a graph with an AsyncDiff sampler.",
  starting: "Starting the workers",
  sampling: "Sampling",
  usual: "ComfyUI samples as usual",
  done: "Last run",
  cancelled: "Last run, cancelled",
  failed: "Last run, failed",
  step: "step {step} of {steps}",
  synchronous: "synchronous",
  asynchronous: "asynchronous",
  waiting: "waiting",
  computing: "computing",
  ready: "ready",
  rank: "Rank {rank} · {device}",
  segment: "segment {segment}",
  branch: "branch {branch}",
  branches: "{count} branches that share out the batch",
  perStep: "seconds per step",
  sequential: "sequential {value}",
  speedup: "speed-up",
  soFar: "whole run so far {value}",
  wholeRun: "whole run {value}",
  sent: "MiB per step",
  sentHint: "between the ranks",
  drift: "drift",
  driftHint: "change of what is sent, from step to step",
  memory: "{used} of {total} GiB",
  plan: "{devices}: {segments}",
  owns: "segment {segment} owns {begins} to {ends} ({share} of the work)",
  replicas: "the last segment runs on {count} devices",
  workers: "Workers alive on {devices}",
  noWorkers: "No workers alive",
  devices: "Devices: {devices}",
  noDevices: "No CUDA GPU is visible to ComfyUI",
  stop: "Stop workers",
  stopped: "Workers stopped",
  away: "The server does not answer",
  copy: "Copy report",
  copied: "Report copied",
  copyByHand: "The browser does not allow copying here; the text is below",
  timeline: "Timeline of the ranks: when each was computing",
  replaced: "{count} samplers replaced. Ctrl+Z takes it back.",
  replacedOne: "{count} sampler replaced. Ctrl+Z takes it back.",
  noStock: "No KSampler or KSampler (Advanced) {where}. {cure}",
  noOurs: "No KSampler (AsyncDiff) or KSampler Advanced (AsyncDiff) {where}. {cure}",
  inSelection: "in the selection",
  inGraph: "in this graph",
  selectOthers: "Select others, or nothing to replace all.",
  otherSamplers: "For other samplers, put AsyncDiff Model between the model and the sampler.",
  otherModel: "For AsyncDiff Model, connect the sampler to the model itself, or bypass the node.",
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
