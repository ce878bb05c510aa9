import { CALL, END, RANK, START, SYNCHRONOUS, WAITS, running } from "./run.js";

const STEPS_SHOWN = 16; // while the run goes on; afterwards it is shown whole

/** First and last second to show: the latest steps of a run under way, or the whole of one that has ended. */
export function span(run) {
  if (run.records.length === 0) return [0, 1];
  const begin = Math.min(...run.records.map((record) => record[START]));
  const end = Math.max(...run.records.map((record) => record[END]));
  if (!running(run)) return [begin, end];
  const last = Math.max(...run.records.map((record) => record[CALL]));
  const shown = run.records.filter((record) => record[CALL] > last - STEPS_SHOWN);
  return [Math.min(...shown.map((record) => record[START])), end];
}

/**
 * The bars of a timeline, one lane per rank, in units of the width and of the lanes.
 *
 * @returns `{ lane, x, width, synchronous, call, waits: [[x, width], ...] }`, all x and width from 0 to 1
 */
export function bars(run, [begin, end] = span(run)) {
  const scale = 1 / Math.max(end - begin, 1e-9);
  const place = (from, to) => {
    const x = Math.max(0, (from - begin) * scale);
    return [x, Math.max(0, Math.min(1, (to - begin) * scale) - x)];
  };
  return run.records
    .filter((record) => record[END] > begin)
    .map((record) => {
      const [x, width] = place(record[START], record[END]);
      const waits = [];
      for (let i = 0; i < record[WAITS].length; i += 2) waits.push(place(record[WAITS][i], record[WAITS][i + 1]));
      return { lane: record[RANK], x, width, synchronous: record[SYNCHRONOUS] === 1, call: record[CALL], waits };
    });
}

/**
 * Draw the timeline of `run` into `canvas`, whose lanes are `laneHeight` CSS pixels high.
 *
 * @param colours `{ synchronous, asynchronous, waiting, text }`
 */
export function drawTimeline(canvas, run, laneHeight, colours) {
  const [width, height] = [canvas.clientWidth, laneHeight * run.ranks.length];
  const context = fit(canvas, width, height);
  context.font = "11px sans-serif";
  context.textBaseline = "middle";
  for (const bar of bars(run)) {
    const [x, y, w, h] = [bar.x * width, bar.lane * laneHeight + 5, Math.max(1, bar.width * width - 1), laneHeight - 10];
    context.fillStyle = bar.synchronous ? colours.synchronous : colours.asynchronous;
    context.fillRect(x, y, w, h);
    context.fillStyle = colours.waiting;
    for (const [from, long] of bar.waits) context.fillRect(from * width, y, long * width, h);
    // not by colour alone: synchronous bars are underlined
    context.fillStyle = colours.text;
    if (bar.synchronous) context.fillRect(x, y + h - 2, w, 2);
    const label = String(bar.call + 1);
    if (context.measureText(label).width + 6 < w) context.fillText(label, x + 3, y + h / 2);
  }
}

/** Draw `values` as a line into `canvas`, from 0 at its bottom. */
export function drawSparkline(canvas, values, colour) {
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  const context = fit(canvas, width, height);
  const top = Math.max(...values, 1e-9);
  context.strokeStyle = colour;
  context.lineWidth = 1.5;
  context.beginPath();
  values.forEach((value, i) => {
    const x = values.length > 1 ? (i / (values.length - 1)) * (width - 2) + 1 : width / 2;
    context.lineTo(x, height - 1 - (value / top) * (height - 2));
  });
  context.stroke();
}

/** An empty drawing of that many CSS pixels, sharp on any screen. */
function fit(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  const size = [Math.round(width * ratio), Math.round(height * ratio)];
  if (canvas.width !== size[0] || canvas.height !== size[1]) [canvas.width, canvas.height] = size;
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return context;
}
