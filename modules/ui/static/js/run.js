// Follows one generation over the server's event stream and draws it. Viewers may come and go: the run goes on without us.

import { post, url } from './api.js';
import { StreamRenderer } from './stream.js';

const place = (position) => (position === 1 ? 'next in the queue' : `number ${position} in the queue`);

function statusText({ state, position, prefill, message }) {
  if (message) return [message, null];
  if (state === 'queued') return [position ? `Waiting: ${place(position)}` : 'Waiting for the model…', null];
  if (state === 'prefill' && prefill?.total) {
    return [`Reading the prompt: ${prefill.done} of ${prefill.total} tokens`, prefill.done / prefill.total];
  }
  if (state === 'prefill') return ['Reading the prompt…', null];
  return ['', null];
}

export class RunFollower {
  /** `onend(node)` gets the final node; `ongone()` is called when the server no longer knows the run. */
  constructor(view, runId, { onflush, onend, ongone }) {
    this.view = view;
    this.runId = runId;
    this.nodeId = view.node.id;
    this.onend = onend;
    this.ongone = ongone;
    this.renderer = new StreamRenderer(view.startStream(), onflush);
    this.failures = 0;
    view.setStatus('Waiting for the model…');
    this.#open();
  }

  #open() {
    this.source = new EventSource(url(`ui-api/runs/${this.runId}/stream`));
    this.source.onmessage = (event) => {
      this.failures = 0;
      if (!this.renderer.text) this.view.setStatus('');
      this.renderer.push(JSON.parse(event.data));
    };
    this.source.addEventListener('status', (event) => {
      if (!this.renderer.text) this.view.setStatus(...statusText(JSON.parse(event.data)));
    });
    for (const kind of ['done', 'failed']) {
      this.source.addEventListener(kind, (event) => this.#finish(JSON.parse(event.data)));
    }
    this.source.onerror = () => {
      // CONNECTING: the browser retries by itself and sends Last-Event-ID, so no text is lost or doubled.
      if (this.source.readyState !== EventSource.CLOSED) return;
      this.failures += 1;
      if (this.failures > 3) this.#gone();
      else this.timer = setTimeout(() => this.#reopen(), 500 * this.failures);
    };
  }

  #reopen() {
    this.renderer.dispose();
    this.renderer = new StreamRenderer(this.view.startStream(), this.renderer.onflush);
    this.#open();
  }

  #finish(node) {
    this.dispose();
    this.renderer.end();
    this.view.setStatus('');
    this.view.finishStream(node, this.renderer.text);
    this.onend(node);
  }

  #gone() {
    this.dispose();
    this.view.setStatus('');
    this.view.finishStream({ ...this.view.node, status: 'interrupted' }, this.renderer.text);
    this.ongone();
  }

  stop() {
    return post(`runs/${this.runId}/stop`);
  }

  /** Stop looking and give the view back, to be drawn from a snapshot. */
  release() {
    this.dispose();
    this.view.setStatus('');
    this.view.abandonStream();
  }

  /** Stop looking; the generation itself goes on. */
  dispose() {
    clearTimeout(this.timer);
    this.source.close();
    this.renderer.dispose();
  }
}
