import { t } from "./messages.js";

// One record: [rank, call, synchronous, start, end, [start, end, ...] of its waits, drift]; times in seconds
export const [RANK, CALL, SYNCHRONOUS, START, END, WAITS, DRIFT] = [0, 1, 2, 3, 4, 5, 6];

/**
 * The run with what an event says of it; `run` and `news` have the records from number `first` on.
 *
 * @returns undefined if records between the two are missing: then ask for the whole state
 */
export function merge(run, news) {
  if (news.records === undefined) return news;
  const same = run?.number === news.number && run.records !== undefined;
  const [first, known] = same ? [run.first, run.records] : [0, []];
  const position = news.first - first;
  if (position < 0 || position > known.length) return undefined;
  return { ...news, first, records: [...known.slice(0, position), ...news.records] };
}

/** Whether the run is under way. */
export function running(run) {
  return run !== undefined && run !== null && ["starting", "sampling", "usual"].includes(run.phase);
}

/** What each rank is doing: `{ step, state }`, its state "computing", "waiting" for the others, or "ready" after the run. */
export function lanes(run) {
  const finished = run.ranks.map(() => 0);
  for (const record of run.records) finished[record[RANK]] = Math.max(finished[record[RANK]], record[CALL] + 1);
  const served = synchronousNow(run) ? 1 : run.plan.stride; // steps of one call
  return finished.map((steps) => {
    if (!running(run)) return { step: steps, state: "ready" };
    const busy = run.step >= steps + served;
    return { step: busy ? run.step : steps, state: busy ? "computing" : "waiting" };
  });
}

/** Whether the latest call was synchronous. */
export function synchronousNow(run) {
  return run.records.length === 0 || run.records.at(-1)[SYNCHRONOUS] === 1;
}

/** Mean drift of every call, in order; calls without any are left out. */
export function drift(run) {
  const byCall = new Map();
  for (const record of run.records) {
    if (record[DRIFT] === null) continue;
    const found = byCall.get(record[CALL]) ?? [];
    byCall.set(record[CALL], [...found, record[DRIFT]]);
  }
  return [...byCall].sort(([a], [b]) => a - b).map(([, values]) => values.reduce((a, b) => a + b) / values.length);
}

/** The plan in words, such as "2 x RTX 4090: segment 1 owns ..., segment 2 ...". */
export function planInWords(run) {
  const counts = new Map();
  for (const rank of run.ranks) counts.set(rank.title, (counts.get(rank.title) ?? 0) + 1);
  const devices = [...counts].map(([title, count]) => (count > 1 ? `${count} x ${title}` : title)).join(" + ");
  const branches = run.plan.branches > 1 ? `${t("branches", { count: run.plan.branches })}, ` : "";
  const segments = onlyBands(run)
    ? [t("bands", { count: run.plan.bands })]
    : run.ranks.slice(0, run.plan.segments).map((rank) =>
        t("owns", {
          segment: rank.segment + 1,
          begins: rank.begins,
          ends: rank.ends,
          share: percent(rank.share),
        }),
      );
  if (run.plan.bands > 1 && !onlyBands(run)) segments.push(t("synchronousBands"));
  if (run.plan.stride > 1) segments.push(t("replicas", { count: run.plan.stride }));
  return t("plan", { devices, segments: branches + segments.join(", ") });
}

/** The part of the work that a rank has, such as "segment 2" or "band 1". */
export function part(run, rank) {
  if (onlyBands(run)) return t("band", { band: (rank % run.plan.bands) + 1 });
  return t("segment", { segment: run.ranks[rank].segment + 1 });
}

/** Whether every call is computed in bands; with segments, synchronous ones are (no warm-up is as long as all steps). */
function onlyBands(run) {
  return run.plan.bands > 1 && (run.plan.segments === 1 || run.plan.warmup === null);
}

/** 0.123 as "12%". */
export function percent(share) {
  return `${Math.round(share * 100)}%`;
}

/** Seconds with three digits that matter, such as "0.0812" or "12.3"; a dash where there are none. */
export function seconds(value) {
  return value === null || value === undefined ? "–" : `${Number(value.toPrecision(3))} s`;
}

/** A ratio, such as "1.87x"; a dash where there is none. */
export function times(value) {
  return value === null || value === undefined ? "–" : `${value.toFixed(2)}x`;
}

/** Bytes in MiB with one decimal, two below one. */
export function mebibytes(bytes) {
  const size = bytes / 2 ** 20;
  return size.toFixed(size < 1 ? 2 : 1);
}

/** Bytes in GiB with one decimal. */
export function gibibytes(bytes) {
  return (bytes / 2 ** 30).toFixed(1);
}
