// The Batch page: files of requests in OpenAI's batch format, answered in the background by the loaded model.

import { del, get, on, overtaken, post, url } from './api.js';
import { confirmDialog } from './dialog.js';
import { ago, bytes, h, plural } from './dom.js';
import { button, duration, field, progressBar, select } from './form.js';
import { icon } from './icons.js';
import { activeResident, modelName, models, watchModels } from './models.js';
import { fail, toast } from './toast.js';

const PIECE = 1 << 20;
const STATES = { uploading: 'Uploaded', waiting: 'Waiting', running: 'Running', paused: 'Paused', cancelled: 'Cancelled', done: 'Done' };
const LAMPS = { running: 'loading', waiting: 'loading', done: 'ready' };
const EXAMPLE = [
  { custom_id: 'greeting', method: 'POST', url: '/v1/chat/completions', body: { messages: [{ role: 'user', content: 'Hello! Who are you?' }], max_tokens: 64 } },
  { custom_id: 'story', method: 'POST', url: '/v1/completions', body: { prompt: 'Once upon a time', max_tokens: 64 } },
].map((line) => JSON.stringify(line)).join('\n');
const grouped = (number) => Number(number).toLocaleString('en');

class BatchPage {
  constructor(root) {
    this.batches = new Map();
    this.model = select([], null, { testid: 'batch-model' });
    this.uploading = h('p', { class: 'sy-hint', role: 'status', 'data-testid': 'batch-uploading' });
    this.list = h('div', { class: 'sy-jobs', 'data-testid': 'batch-jobs' });
    root.replaceChildren(
      h('div', { class: 'sy-page-head' }, h('h2', {}, 'Batch')),
      h('p', { class: 'sy-hint' }, 'Answer a file of requests in the background, as many at once as the backend runs. Chats go first. What is done stays, whatever ends it: a batch goes on where it stopped.'),
      this.#form(),
      h('div', { class: 'sy-page-head' }, h('h2', {}, 'Batches')),
      this.list,
    );
    on('batch', (batch) => this.#heard(batch));
    on('resync', () => this.refresh());
    watchModels(() => this.#fillModels());
    this.refresh();
  }

  async refresh() {
    try {
      const data = await get('batches');
      const known = this.batches;
      this.batches = new Map(data.batches.map((batch) => [batch.id, overtaken(batch, known.get(batch.id)) ? known.get(batch.id) : batch]));
      this.#drawAll();
    } catch (error) {
      if (error.code !== 'offline') fail(error);
    }
  }

  // --- upload ---

  #form() {
    const input = h('input', { type: 'file', accept: '.jsonl,.ndjson,application/x-ndjson,application/jsonl', class: 'sy-offscreen', 'aria-label': 'Choose a batch file', tabindex: '-1', 'data-testid': 'batch-file' });
    input.addEventListener('change', () => {
      const [file] = input.files;
      if (file) this.#upload(file).finally(() => { input.value = ''; });
    });
    this.choose = button('Choose a file…', () => input.click(), true, 'batch-choose');
    const form = h('section', { class: 'sy-card sy-tool-form', 'aria-label': 'New batch' },
      h('div', { class: 'sy-fields' },
        field('Model', this.model, 'Answers every line, whatever model the line names. Load another on the Models page.'),
        h('div', { class: 'sy-field' }, h('span', { class: 'sy-label' }, 'File'), h('span', { class: 'sy-file' }, this.choose, input), h('p', { class: 'sy-field-help' }, 'One request a line (JSONL). You can also drop it here.'))),
      this.uploading,
      h('details', {}, h('summary', {}, 'The format'),
        h('p', { class: 'sy-hint' }, 'OpenAI’s batch files: custom_id of your choice, url /v1/chat/completions, /v1/completions or /v1/embeddings, and the request as body. Each result is one line with the same custom_id.'),
        h('pre', { class: 'sy-batch-example', tabindex: '0' }, EXAMPLE),
        h('div', { class: 'sy-card-actions' }, button('Try these two lines', () => this.#upload(new File([`${EXAMPLE}\n`], 'example.jsonl')), false, 'batch-example'))),
    );
    form.addEventListener('dragover', (event) => event.preventDefault());
    form.addEventListener('drop', (event) => {
      event.preventDefault();
      const [file] = event.dataTransfer.files;
      if (file) this.#upload(file);
    });
    return form;
  }

  #fillModels() {
    const before = this.model.value;
    const ready = models.residents.filter((resident) => resident.state === 'ready');
    this.model.replaceChildren(...(ready.length ? ready.map((resident) => h('option', { value: modelName(resident) }, modelName(resident))) : [h('option', { value: '' }, 'No model is loaded')]));
    this.model.value = ready.some((resident) => modelName(resident) === before) ? before : modelName(activeResident()) || this.model.options[0].value;
    this.model.disabled = !ready.length;
  }

  async #upload(file) {
    if (!file.size) {
      toast('The file is empty.', { level: 'error' });
      return;
    }
    this.choose.disabled = true;
    try {
      const batch = await post('batches', { name: file.name });
      let offset = 0;
      const whole = new Uint8Array(await file.slice(0, 3).arrayBuffer());
      const skip = whole[0] === 0xef && whole[1] === 0xbb && whole[2] === 0xbf ? 3 : 0;
      while (offset + skip < file.size) {
        const piece = await this.#piece(file, offset + skip);
        await post(`batches/${batch.id}/input`, { text: piece.text, offset });
        offset += piece.bytes;
        this.uploading.textContent = `${file.name}: ${bytes(offset)} of ${bytes(file.size)}`;
      }
      this.uploading.textContent = '';
      this.#heard(await post(`batches/${batch.id}/start`, { model: this.model.value || null }));
      this.list.scrollIntoView({ block: 'nearest' });
    } catch (error) {
      this.uploading.textContent = '';
      if (error instanceof TypeError) toast('The file is not UTF-8 text.', { level: 'error' });
      else fail(error);
      this.refresh();
    } finally {
      this.choose.disabled = false;
    }
  }

  /** About PIECE bytes from `start`, cut where a character ends. */
  async #piece(file, start) {
    const raw = new Uint8Array(await file.slice(start, start + PIECE).arrayBuffer());
    let end = raw.length;
    if (start + raw.length < file.size) {
      end -= 1;
      while (end > 0 && (raw[end] & 0xc0) === 0x80) end -= 1;
    }
    const text = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(raw.subarray(0, end));
    return { text, bytes: end };
  }

  // --- batches ---

  #heard(batch) {
    if (batch.state === 'deleted') {
      this.batches.delete(batch.id);
      this.#drawAll();
      return;
    }
    const known = this.batches.get(batch.id);
    if (overtaken(batch, known)) return;
    this.batches.set(batch.id, batch);
    const card = this.list.querySelector(`[data-batch="${batch.id}"]`);
    if (card && known && known.state === batch.state && known.problem === batch.problem) card.querySelector('.sy-job-live').replaceWith(this.#live(batch));
    else this.#drawAll();
  }

  #drawAll() {
    const focused = document.activeElement?.closest?.('[data-batch]')?.dataset.batch;
    const batches = [...this.batches.values()].sort((a, b) => b.created_at - a.created_at);
    this.list.replaceChildren(...(batches.length ? batches.map((batch) => this.#card(batch)) : [h('p', { class: 'sy-hint' }, 'No batch yet.')]));
    if (focused) this.list.querySelector(`[data-batch="${focused}"] button`)?.focus();
  }

  #live(batch) {
    const working = ['running', 'waiting'].includes(batch.state);
    const parts = [
      batch.lines ? `${grouped(batch.done)} of ${plural(batch.lines, 'line').replace(batch.lines, grouped(batch.lines))}` : bytes(batch.bytes),
      batch.failed ? `${grouped(batch.failed)} with errors` : '',
      batch.completion_tokens ? `${grouped(batch.completion_tokens)} tokens` : '',
      working && batch.tokens_per_s ? `${grouped(Math.round(batch.tokens_per_s))} tokens/s` : '',
      working && batch.remaining_s !== null && batch.done < batch.lines ? `about ${duration(batch.remaining_s)} left` : '',
    ];
    return h('div', { class: 'sy-job-live', role: 'status' },
      working ? progressBar(batch.state === 'running' && batch.lines ? batch.done / batch.lines : null, `Progress of ${batch.name}`) : '',
      h('p', { class: 'sy-hint', 'data-testid': 'batch-progress' }, parts.filter(Boolean).join(' · ')),
    );
  }

  #card(batch) {
    const working = ['running', 'waiting'].includes(batch.state);
    const lamp = batch.state === 'paused' && batch.problem ? 'failed' : LAMPS[batch.state] || 'empty';
    const act = (path, body) => post(`batches/${batch.id}/${path}`, body).then((now) => this.#heard(now)).catch(fail);
    const start = { uploading: 'Start', paused: 'Go on', cancelled: 'Go on' }[batch.state];
    return h('article', { class: 'sy-card', 'data-testid': 'batch-job', 'data-batch': batch.id, 'data-state': batch.state },
      h('div', { class: 'sy-state', 'data-state': lamp }, h('span', { class: 'sy-lamp' }), h('strong', { dir: 'auto' }, batch.name), h('span', { class: 'sy-badge' }, STATES[batch.state] || batch.state)),
      h('p', { class: 'sy-hint' }, [batch.model, ago(batch.created_at)].filter(Boolean).join(' · ')),
      this.#live(batch),
      batch.problem ? h('p', { class: 'sy-card-error', dir: 'auto' }, icon('warning', 16), ` ${batch.problem}`) : '',
      h('div', { class: 'sy-card-actions' },
        start ? button(start, () => act('start', { model: batch.model || this.model.value || null }), true, 'batch-start') : '',
        working ? button('Pause', () => act('pause'), false, 'batch-pause') : '',
        working || batch.state === 'paused' ? button('Cancel', () => act('cancel'), false, 'batch-cancel') : '',
        batch.done ? h('a', { class: 'sy-button', href: url(`ui-api/batches/${batch.id}/results`), download: '', 'data-testid': 'batch-results' }, 'Download results') : '',
        working ? '' : button('Delete', () => this.#delete(batch), false, 'batch-delete'),
      ),
    );
  }

  async #delete(batch) {
    if (batch.done && !(await confirmDialog('Delete this batch?', `${batch.name} and its ${plural(batch.done, 'result')} are deleted.`, 'Delete'))) return;
    await del(`batches/${batch.id}`).then(() => this.#heard({ id: batch.id, state: 'deleted' })).catch(fail);
  }
}

/** Called by Gradio when the component is on the page. */
export function mount({ element }) {
  const root = element.querySelector('.sy-batch');
  if (root.dataset.mounted) return;
  root.dataset.mounted = '1';
  root.classList.add('sy-models', 'sy-tool');
  new BatchPage(root);
}
