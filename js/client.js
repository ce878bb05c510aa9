const RENEW = 5000; // milliseconds; the server forgets a page that has not asked for three times as long

/**
 * The state of the server, and events from it, while somebody looks.
 *
 * @param api the page's own client of the server
 * @param interval () => seconds between two events
 */
export class Client {
  constructor(api, interval) {
    this._api = api;
    this._interval = interval;
    this._event = ({ detail }) => this._onrun(detail);
    this._ask = () => this.refresh();
    this._leave = () => this._dismiss();
  }

  /** Begin to watch. `onstate` is given the whole state now and then, `onrun` what is new in the run. */
  open(onstate, onrun) {
    this._onstate = onstate;
    this._onrun = onrun;
    this._api.addEventListener("asyncdiff.run", this._event);
    this._api.addEventListener("reconnected", this._ask);
    window.addEventListener("pagehide", this._leave);
    this._timer = setInterval(this._ask, RENEW);
    return this.refresh();
  }

  /** Stop watching: the server stops sending. */
  close() {
    if (this._timer === undefined) return;
    this._timer = clearInterval(this._timer);
    window.removeEventListener("pagehide", this._leave);
    this._api.removeEventListener("asyncdiff.run", this._event);
    this._api.removeEventListener("reconnected", this._ask);
    this._onstate = this._onrun = () => {};
    this._dismiss();
  }

  /** Ask for the whole state. */
  async refresh() {
    if (document.hidden) return; // nobody looks
    const asked = (this._asked = {});
    const answer = await this._fetch(this._path(this._interval()));
    if (answer && asked === this._asked) this._onstate(answer); // not one that was overtaken
  }

  _path(interval) {
    return `/asyncdiff/state?${new URLSearchParams({ client: this._api.clientId ?? "", interval })}`;
  }

  /** No more events, from now on and not only when the server has waited long enough. */
  _dismiss() {
    this._fetch(this._path(0), { keepalive: true });
  }

  /** End the idle workers; the answer is `{ stopped }`, `{ error }`, or undefined where the server is away. */
  async stop() {
    const answer = await this._post("/asyncdiff/stop");
    await this.refresh();
    return answer;
  }

  /** Try out the devices, which takes minutes; the answer is `{ text }`, `{ error }`, or undefined as above. */
  selfTest() {
    return this._post("/asyncdiff/selftest");
  }

  _post(path) {
    return this._fetch(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: "{}" });
  }

  async _fetch(path, options) {
    try {
      return await (await this._api.fetchApi(path, options)).json();
    } catch {
      return undefined; // the server is away: the page says so, and "reconnected" comes when it is back
    }
  }
}
