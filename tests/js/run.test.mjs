import assert from "node:assert/strict";
import test from "node:test";

import * as show from "../../js/run.js";
import { bars, span } from "../../js/timeline.js";

const RANKS = [
  { segment: 0, title: "RTX 4090", begins: "input_blocks.3", ends: "output_blocks.2", share: 0.512 },
  { segment: 1, title: "RTX 4090", begins: "output_blocks.3", ends: "input_blocks.2", share: 0.488 },
];
const PLAN = { segments: 2, stride: 1, warmup: 2 };

/** Two synchronous calls of 2 s, one rank after the other, then asynchronous ones of 1 s, side by side. */
function records(calls) {
  const found = [];
  for (let call = 0; call < calls; call++) {
    for (const rank of [0, 1]) {
      const synchronous = call < 2;
      const start = synchronous ? 2 * call : 2 + call;
      const waits = synchronous ? (rank === 0 ? [start + 1, start + 2] : [start, start + 1]) : [];
      found.push([rank, call, synchronous ? 1 : 0, start, start + (synchronous ? 2 : 1), waits, call ? 0.1 * rank : null]);
    }
  }
  return found;
}

function run(calls, changes = {}) {
  return { number: 1, phase: "sampling", steps: 40, step: calls, plan: PLAN, ranks: RANKS, first: 0, records: records(calls), ...changes };
}

test("events add to the run, and may overlap what is known", () => {
  const all = records(5);
  const known = run(3);
  const news = { ...run(5), first: 4, records: all.slice(4) };
  assert.deepEqual(show.merge(known, news), run(5));
});

test("the first event of another run replaces the one before", () => {
  assert.deepEqual(show.merge(run(5), run(1, { number: 2 })), run(1, { number: 2 }));
});

test("missing records are noticed", () => {
  const late = { ...run(5), first: 8, records: records(5).slice(8) };
  assert.equal(show.merge(run(3), late), undefined);
  assert.equal(show.merge(undefined, late), undefined);
  assert.equal(show.merge(run(3), { ...late, number: 2 }), undefined);
});

test("of a very long run only the end is known, and it goes on", () => {
  const known = { ...run(5), first: 4, records: records(5).slice(4) };
  const merged = show.merge(known, { ...run(6), first: 10, records: records(6).slice(10) });
  assert.equal(merged.first, 4);
  assert.deepEqual(merged.records, records(6).slice(4));
  assert.equal(show.merge(known, { ...run(6), first: 2, records: [] }), undefined);
});

test("a run that has not begun to sample has no records", () => {
  const starting = { number: 2, phase: "starting", steps: 20, step: 0, notes: [] };
  assert.equal(show.merge(run(3), starting), starting);
  assert.deepEqual(show.merge(starting, run(1, { number: 2 })).records, records(1));
});

test("a rank computes until it has finished the call that was begun", () => {
  const now = run(4, { step: 4, records: records(4).slice(0, 7) }); // rank 1 has not finished call 3
  assert.deepEqual(show.lanes(now), [
    { step: 4, state: "waiting" },
    { step: 4, state: "computing" },
  ]);
  assert.deepEqual(show.lanes(run(40, { phase: "done" })), [
    { step: 40, state: "ready" },
    { step: 40, state: "ready" },
  ]);
});

test("with stride two, a rank has served the next step, too", () => {
  const stride = { ...run(3), plan: { ...PLAN, stride: 2 } };
  assert.deepEqual(show.lanes({ ...stride, step: 4 })[0].state, "waiting");
  assert.deepEqual(show.lanes({ ...stride, step: 5 })[0].state, "computing");
});

test("the latest call tells synchronous from asynchronous", () => {
  assert.equal(show.synchronousNow(run(0)), true);
  assert.equal(show.synchronousNow(run(2)), true);
  assert.equal(show.synchronousNow(run(3)), false);
});

test("drift is the mean over what was received in a call", () => {
  assert.deepEqual(show.drift(run(3)), [0.05, 0.05]);
});

test("the plan in words", () => {
  const words = "2 x RTX 4090: segment 1 computes input_blocks.3 to output_blocks.2 (51% of the work), segment 2 computes output_blocks.3 to input_blocks.2 (49% of the work)";
  assert.equal(show.planInWords(run(1)), words);
  const unequal = [RANKS[0], { ...RANKS[1], title: "RTX 3060" }, { ...RANKS[1], title: "RTX 3060" }];
  const stride = show.planInWords(run(1, { ranks: unequal, plan: { ...PLAN, stride: 2 } }));
  assert.match(stride, /^RTX 4090 \+ 2 x RTX 3060: .*, the last segment runs on 2 devices$/);
  const halves = show.planInWords(run(1, { plan: { ...PLAN, segments: 1, branches: 2 } }));
  assert.match(halves, /^2 x RTX 4090: 2 branches that share the batch, segment 1 computes [^,]*$/);
  const warmup = show.planInWords(run(1, { plan: { ...PLAN, bands: 2 } }));
  assert.equal(warmup, `${words}, synchronous steps in bands of the picture`);
});

test("bands in words", () => {
  const four = [0, 1, 2, 3].map((rank) => ({ ...RANKS[0], segment: 0, branch: Math.floor(rank / 2) }));
  const banded = run(1, { ranks: four, plan: { ...PLAN, segments: 1, branches: 2, bands: 2 } });
  const words = "4 x RTX 4090: 2 branches that share the batch, 2 bands of the picture, each with the whole network";
  assert.equal(show.planInWords(banded), words);
  assert.deepEqual([0, 1, 2, 3].map((rank) => show.part(banded, rank)), ["band 1", "band 2", "band 1", "band 2"]);
  assert.deepEqual([0, 1].map((rank) => show.part(run(1), rank)), ["segment 1", "segment 2"]);
});

test("numbers as people read them", () => {
  assert.deepEqual([0.08123, 12.345, null].map(show.seconds), ["0.0812 s", "12.3 s", "–"]);
  assert.deepEqual([1.8684, undefined].map(show.times), ["1.87x", "–"]);
  assert.deepEqual([2 ** 18, 3.75 * 2 ** 20].map(show.mebibytes), ["0.25", "3.8"]);
});

test("while a run goes on its latest steps are shown, afterwards all of it", () => {
  assert.deepEqual(span(run(0)), [0, 1]);
  assert.deepEqual(span(run(30)), [16, 32]);
  assert.deepEqual(span(run(30, { phase: "done" })), [0, 32]);
});

test("bars lie one after the other in the warm-up, and side by side afterwards", () => {
  const found = bars(run(4, { phase: "done" }));
  assert.equal(found.length, 8);
  const busy = (bar) => {
    const cuts = bar.waits.map(([x, width]) => [x, x + width]);
    return cuts.reduce((parts, [a, b]) => parts.flatMap(([x, y]) => [[x, Math.min(y, a)], [Math.max(x, b), y]]), [[bar.x, bar.x + bar.width]]).filter(([x, y]) => y - x > 1e-9);
  };
  const overlap = (call) => {
    const [a, b] = found.filter((bar) => bar.call === call).map(busy);
    return Math.max(0, Math.min(a[0][1], b[0][1]) - Math.max(a[0][0], b[0][0]));
  };
  assert.ok(overlap(0) < 1e-9 && overlap(1) < 1e-9);
  assert.ok(Math.abs(overlap(2) - 1 / 6) < 1e-9 && Math.abs(overlap(3) - 1 / 6) < 1e-9);
});

test("bars that began before the window are cut off at its edge", () => {
  const [first] = bars(run(4), [1, 6]);
  assert.equal(first.x, 0);
  assert.ok(Math.abs(first.width - 0.2) < 1e-9);
});
