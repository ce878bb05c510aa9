import { t } from "./messages.js";
import * as show from "./run.js";
import { drawSparkline, drawTimeline } from "./timeline.js";

const LANE = 44; // pixels

/** The panel *AsyncDiff*: what every rank does while a picture is sampled; otherwise the devices and the last run. */
export class Panel {
  /**
   * @param client a Client
   * @param copy async text => puts it on the clipboard, or throws
   */
  constructor({ client, copy }) {
    this._client = client;
    this._copy = copy;
    this._state = undefined; // the server's latest whole answer
    this._run = undefined;
  }

  /** Fill `element` and keep it up to date. */
  show(element) {
    if (this._root) return element.replaceChildren(this._root); // the page may ask again while it is shown
    this._root = build("section", { className: "asyncdiff-panel", ariaLabel: "AsyncDiff" });
    element.replaceChildren(this._root);
    this._fixed();
    this._resized = new ResizeObserver(() => this._draw());
    this._resized.observe(this._root);
    this._client.open(
      (state) => this._take(state),
      (news) => this._follow(news),
    );
  }

  /** Stop, when the panel is closed. */
  hide() {
    this._resized?.disconnect();
    this._client.close();
    this._root?.remove();
    this._root = undefined;
  }

  _take(state) {
    if (!this._root?.isConnected) return this.hide(); // another tab took the place without a word
    this._state = state;
    this._run = state.run ?? undefined;
    this._update();
  }

  _follow(news) {
    const merged = show.merge(this._run, news);
    if (merged === undefined) return this._client.refresh();
    this._run = merged;
    this._update();
    if (!show.running(merged)) this._client.refresh(); // for the report
  }

  /** What never changes: the places for everything else, and the buttons. */
  _fixed() {
    this._status = build("p", { className: "asyncdiff-status" });
    this._plan = build("p", { className: "asyncdiff-plan" });
    this._numbers = build("dl", { className: "asyncdiff-numbers" });
    this._sparkline = build("canvas", { className: "asyncdiff-sparkline", role: "img" });
    this._labels = build("div", { className: "asyncdiff-labels" });
    this._timeline = build("canvas", { className: "asyncdiff-timeline", role: "img", ariaLabel: t("timeline") });
    this._chart = build("div", { className: "asyncdiff-chart" }, this._labels, this._timeline);
    this._legend = build("p", { className: "asyncdiff-legend" });
    for (const kind of ["synchronous", "asynchronous", "waiting"]) {
      const key = build("span", { className: `asyncdiff-key asyncdiff-${kind}` });
      this._legend.append(build("span", { title: t(`${kind}Hint`) }, key, t(kind)), " ");
    }
    this._stop = build("button", { type: "button", textContent: t("stop"), onclick: () => this._stopWorkers() });
    this._stop.title = t("stopHint");
    this._copyButton = build("button", { type: "button", textContent: t("copy"), onclick: () => this._copyReport() });
    this._answer = build("span", { className: "asyncdiff-answer", role: "status" });
    this._workers = build("span", { className: "asyncdiff-workers" });
    this._text = build("textarea", { readOnly: true, hidden: true, ariaLabel: t("copy") });
    const buttons = build("div", { className: "asyncdiff-buttons" });
    buttons.append(this._stop, this._copyButton, this._answer, this._workers, this._legend);
    const head = build("header", {}, build("div", {}, this._status, this._plan), this._numbers);
    this._root.append(head, this._chart, buttons, this._text);
    this._update();
  }

  _update() {
    if (this._root === undefined) return;
    const [run, state] = [this._run, this._state];
    const routed = run?.ranks !== undefined;
    this._status.textContent = run ? this._phase(run) : t("idle");
    const lines = [...(routed ? [show.planInWords(run)] : []), ...(run?.notes ?? [])];
    this._plan.title = routed ? t("planHint") : "";
    this._plan.replaceChildren(...lines.map((line) => build("span", { textContent: line })));
    this._showNumbers(routed ? run : undefined);
    this._showLanes(routed ? run : undefined);
    this._chart.hidden = this._legend.hidden = !routed;
    this._stop.disabled = !state?.workers.length || show.running(run);
    this._copyButton.disabled = !state?.report;
    this._workers.textContent = state ? this._devices(state) : "";
    this._draw();
  }

  _phase(run) {
    const parts = [t(run.phase)];
    if (run.step > 0) parts.push(t("step", { step: run.step, steps: run.steps }));
    if (run.phase === "sampling") parts.push(t(show.synchronousNow(run) ? "synchronous" : "asynchronous"));
    return parts.join(" · ");
  }

  _devices(state) {
    if (state.workers.length) return t("workers", { devices: state.workers.map((one) => one.devices.join(", ")).join("; ") });
    const devices = state.devices.map((one) => `${one.title} (${show.gibibytes(one.total)} GiB)`).join(", ");
    return `${t("noWorkers")}. ${devices ? t("devices", { devices }) : t("noDevices")}`;
  }

  _showNumbers(run) {
    if (!run) return this._numbers.replaceChildren();
    const whole = show.times(run.speedup_so_far);
    const drift = show.drift(run);
    const last = drift.length ? show.percent(drift.at(-1)) : "–";
    this._sparkline.ariaLabel = `${t("drift")}: ${last}`;
    this._numbers.replaceChildren(
      number("perStep", show.seconds(run.seconds_now), t("sequential", { value: show.seconds(run.sequential) })),
      number("speedup", show.times(run.speedup), t(show.running(run) ? "soFar" : "wholeRun", { value: whole })),
      number("sent", show.mebibytes(run.bytes_per_step), t("sentBetween")),
      number("drift", last, this._sparkline),
    );
  }

  _showLanes(run) {
    this._labels.replaceChildren();
    if (!run) return;
    const doing = show.lanes(run);
    this._labels.replaceChildren(
      ...run.ranks.map((rank, i) => {
        const what = [show.part(run, i)];
        if (run.plan.branches > 1) what.unshift(t("branch", { branch: rank.branch + 1 }));
        if (doing[i].step > 0) what.push(t("step", { step: doing[i].step, steps: run.steps }));
        what.push(t(doing[i].state));
        const [used, total] = run.memory[i] ?? [];
        const memory = total ? build("meter", { max: total, value: used }) : "";
        const words = total ? t("memory", { used: show.gibibytes(used), total: show.gibibytes(total) }) : "";
        const label = build("div", { className: "asyncdiff-lane", title: t("laneHint") });
        label.append(
          build("strong", { textContent: t("rank", { rank: i, device: rank.title }) }),
          build("span", { className: "asyncdiff-memory" }, memory, ` ${words}`),
          build("span", { className: "asyncdiff-doing", textContent: what.join(" · ") }),
        );
        return label;
      }),
    );
  }

  _draw() {
    const run = this._run;
    if (this._root === undefined || run?.ranks === undefined) return;
    const style = getComputedStyle(this._root);
    const colour = (name) => style.getPropertyValue(`--asyncdiff-${name}`).trim();
    this._timeline.style.height = `${LANE * run.ranks.length}px`;
    drawTimeline(this._timeline, run, LANE, {
      synchronous: colour("synchronous"),
      asynchronous: colour("asynchronous"),
      waiting: colour("waiting"),
      text: colour("on-bar"),
    });
    drawSparkline(this._sparkline, show.drift(run), colour("asynchronous"));
  }

  async _stopWorkers() {
    const answer = await this._client.stop();
    this._answer.textContent = answer ? (answer.error ?? t("stopped")) : t("away");
  }

  async _copyReport() {
    const text = this._state.report;
    try {
      await this._copy(text);
      this._answer.textContent = t("copied");
      this._text.hidden = true;
    } catch {
      // without https the browser keeps the clipboard to itself
      this._answer.textContent = t("copyByHand");
      Object.assign(this._text, { hidden: false, value: text });
      this._text.select();
    }
  }
}

function build(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  const { role, ...rest } = properties;
  if (role) element.setAttribute("role", role);
  Object.assign(element, rest);
  element.append(...children);
  return element;
}

/** A number with its name, what more there is to say of it, and an explanation on hovering. */
function number(name, value, more) {
  const parts = [build("dt", { textContent: t(name) }), build("dd", { textContent: value }), build("dd", {}, more)];
  return build("div", { title: t(`${name}Hint`) }, ...parts);
}
