/** What the server tells, for as long as someone looks. */

export const EVENT = "intelligent_vram";
const ROUTE = "/intelligent_vram/watch";
const RENEW = 5000;
const RETRY = 1000;

/**
 * A subscription to one kind of message. It is renewed while the page is visible, and taken up again when the websocket
 * was closed and is back.
 */
export class Feed {
  /**
   * @param {object} api ComfyUI's api
   * @param {"panel" | "nodes"} what
   * @param {(told: object) => void} tell gets each message
   * @param {(connected: boolean) => void} [connection] is told when the connection is lost or back
   */
  constructor(api, what, tell, connection = () => {}) {
    this.api = api;
    this.what = what;
    this.wanted = false;
    this.timer = undefined;
    this.connection = connection;
    api.addEventListener(EVENT, ({ detail }) => {
      if (!this.wanted || detail?.[what] === undefined) return;
      connection(true);
      tell(detail[what]);
    });
    api.addEventListener("reconnecting", () => this.wanted && connection(false));
    api.addEventListener("reconnected", () => this.renew());
    document.addEventListener("visibilitychange", () => this.renew());
  }

  /** Begin to be told. */
  start() {
    if (this.wanted) return;
    this.wanted = true;
    this.renew();
  }

  /** Be told no more. */
  stop() {
    if (!this.wanted) return;
    this.wanted = false;
    clearTimeout(this.timer);
    this.ask(false).catch(() => {});
  }

  /** Ask once more, and again after a while. */
  async renew() {
    clearTimeout(this.timer);
    if (!this.wanted || document.visibilityState === "hidden") return;
    let known = false;
    try {
      known = (await this.ask(true)).ok;
    } catch {
      this.connection(false);
    }
    clearTimeout(this.timer);
    if (this.wanted) this.timer = setTimeout(() => this.renew(), known ? RENEW : RETRY);
  }

  /**
   * @param {boolean} on
   * @returns {Promise<Response>}
   */
  ask(on) {
    return this.api.fetchApi(ROUTE, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ client: this.api.clientId ?? "", what: this.what, on }),
    });
  }
}
