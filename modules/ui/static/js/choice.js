// What is chosen in the top bar's two dropdowns. Gradio holds the values, and the server fills in what follows from a choice.
// One fill is under way at a time, and none may undo a choice that was made after what it tells of.

// An answer that takes longer than this is not waited for.
const ANSWER_MS = 8000;
// What has changed, each including those before it: which models and backends there are; the saved options; what is loaded.
const CHANGES = ['lists', 'options', 'loaded'];

/** Controls that the server fills, one fill at a time: Gradio drops an event whose predecessor is still being answered. */
export class Fill {
  constructor(ask) {
    this.ask = ask;
    this.since = null;
    this.more = false;
  }

  again() {
    if (this.since !== null && Date.now() - this.since < ANSWER_MS) {
      this.more = true;
      return;
    }
    this.more = false;
    this.since = Date.now();
    this.ask();
  }

  done() {
    this.since = null;
    if (this.more) this.again();
  }
}

export class Choice {
  /** `fill(data)` asks the server: {} shows what is loaded; {model, backend} keeps these, their options filled in again on `options`. */
  constructor(fill) {
    this.fill = fill;
    this.current = [null, null]; // model, backend: as the dropdowns show them
    this.wanted = null; // the user's last choice
    this.picks = 0; // choices that the server has not answered
    this.filling = false;
    this.since = 0;
    this.changes = null; // what the next fill is for
    this.overtaken = false; // a choice was made while a fill was under way, which may undo it
    this.restoring = false; // the fill that is under way brings such a choice back
    this.afterwards = null;
  }

  /** One of CHANGES. What is loaded is shown, unless the user is just choosing another. */
  changed(what) {
    const kind = what === 'loaded' && this.#picking() ? 'options' : what;
    if (CHANGES.indexOf(kind) > CHANGES.indexOf(this.changes)) this.changes = kind;
    this.#next();
  }

  /** A choice of a model, or of its backend, is on its way to the server. False: it is known, as Gradio tells of each twice. */
  picking(model, backend = null) {
    const filling = this.#filling(); // then what the dropdowns show is not known
    const known = this.#picking() ? this.wanted : filling ? [] : this.current;
    this.picks = (this.#picking() ? this.picks : 0) + 1; // an answer that never came is not waited for again
    this.since = Date.now();
    if (model === known[0] && (backend === null || backend === known[1])) return false;
    this.overtaken ||= filling;
    if (this.changes === 'loaded') this.changes = 'options';
    this.wanted = [model, backend];
    return true;
  }

  picked(...current) {
    this.picks = Math.max(0, this.picks - 1);
    this.current = current;
    this.#next();
  }

  /** The first values are on the page; no fill of ours was asked for them. */
  shown(...current) {
    if (!this.#picking() && !this.#filling()) this.current = current;
  }

  filled(...current) {
    this.filling = false;
    this.current = current;
    this.#next();
  }

  /** Whether what follows from a choice is still to be filled in; `afterwards` is called once it is. */
  get unsettled() {
    return this.#picking() || (this.#filling() && (this.overtaken || this.restoring));
  }

  #picking() {
    return this.picks > 0 && Date.now() - this.since < ANSWER_MS;
  }

  #filling() {
    return this.filling && Date.now() - this.since < ANSWER_MS;
  }

  #next() {
    if (this.#picking() || this.#filling()) return;
    this.restoring = this.overtaken;
    if (this.overtaken) {
      const [model, backend] = this.wanted;
      this.#fill({ model, backend, options: true });
    } else if (this.changes) {
      const [model, backend] = this.current;
      this.#fill(this.changes === 'loaded' ? {} : { model, backend, options: this.changes === 'options' });
    } else if (this.afterwards) {
      const fn = this.afterwards;
      this.afterwards = null;
      if (Date.now() - this.since < ANSWER_MS) setTimeout(fn); // Gradio has shown the new values by then
    }
  }

  #fill(data) {
    this.overtaken = false;
    this.changes = null;
    this.filling = true;
    this.since = Date.now();
    this.fill(data);
  }
}
