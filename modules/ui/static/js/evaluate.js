// The Evaluate page: choose models and backends, run in the background, read the table, plots and answers, compare runs.

import { get, on, post, put } from './api.js';
import { h, local, plural } from './dom.js';
import { bar, button, field, fileButton, numberInput, progressBar, select, textInput, tick } from './form.js';
import { models, watchModels } from './models.js';
import { Results } from './evalresults.js';
import { fail, toast } from './toast.js';

const STAGES = { load: 'loading', speed: 'speed', answers: 'questions', tasks: 'tasks', end: '' };

class EvaluatePage {
  constructor(root) {
    this.chosen = new Map();
    this.texts = new Set(['bundled']);
    this.live = h('div', { 'data-testid': 'evaluate-live', role: 'status' });
    this.form = h('section', { class: 'sy-card sy-tool-form', 'aria-label': 'New evaluation' });
    this.results = new Results((ids) => local.set('sy-evaluation', ids.join(',')), () => this.refresh());
    root.replaceChildren(
      h('div', { class: 'sy-page-head' }, h('h2', {}, 'Evaluate')),
      h('p', { class: 'sy-hint' }, 'Perplexity, speed, memory and answers of any models through any backends, one after another, each in a process of its own beside the chat’s model. Runs go on without this page and are kept.'),
      this.live,
      this.form,
      this.results.element,
    );
    window.switchyard.evaluate = (ids) => this.choose(ids);
    on('evaluation', (event) => this.#heard(event));
    on('resync', () => this.refresh());
    this.refresh(true);
  }

  async refresh(first = false) {
    try {
      this.data = await get('evaluations');
    } catch (error) {
      if (error.code !== 'offline') fail(error);
      return;
    }
    if (first) {
      this.#drawForm();
      watchModels(() => this.#drawModels());
    } else this.#drawTexts();
    this.results.list(this.data.runs);
    const [active] = this.data.active;
    this.#drawLive(active);
    const wanted = (local.get('sy-evaluation') || '').split(',').filter((id) => this.data.runs.some((run) => run.id === id));
    if (first && (active || wanted.length || this.data.runs.length)) this.results.open(active ? [active.id] : wanted.length ? wanted : [this.data.runs[0].id]);
  }

  /** Called by other pages: choose exactly these models and come here. */
  choose(ids) {
    this.chosen.clear();
    for (const id of ids) {
      const model = models.list.find((item) => item.id === id);
      const best = model?.loaders?.find((loader) => loader.ok);
      if (best) this.chosen.set(`${id}\n${best.name}`, { model: id, loader: best.name });
    }
    this.#drawModels();
    window.switchyard.page('evaluate');
  }

  // --- the form ---

  #drawForm() {
    const { questions } = this.data;
    this.models = h('div', { class: 'sy-pick', role: 'group', 'aria-label': 'Models and backends', 'data-testid': 'evaluate-models' });
    this.filter = textInput('', { placeholder: 'Filter models', testid: 'evaluate-filter' });
    this.filter.setAttribute('aria-label', 'Filter models');
    this.filter.addEventListener('input', () => this.#drawModels());
    this.textsBox = h('div', { class: 'sy-ticks', 'data-testid': 'evaluate-texts' });
    this.context = numberInput('', { min: 2, max: 1048576 });
    this.context.placeholder = '2048, or what the model holds';
    this.stride = numberInput('', { min: 1, max: 1048576 });
    this.stride.placeholder = 'the context: no overlap';
    this.most = numberInput('', { min: 1 });
    this.most.placeholder = 'all';
    this.windows = bar('Windows', [['papers', 'As the papers'], ['rolling', 'Rolling']], 'papers');
    this.speed = tick('Prefill and decode speed', true, { note: 'Tokens per second, with one beam and with several.', testid: 'evaluate-speed' });
    this.promptTokens = numberInput(512, { min: 1 });
    this.newTokens = numberInput(64, { min: 2 });
    this.repetitions = numberInput(3, { min: 1 });
    this.beams = textInput('1, 4');
    this.ask = tick('Answers side by side', false, { note: 'The same questions to every model, greedily, beside the float32 ground truth.', testid: 'evaluate-ask', onchange: () => this.#askChanged() });
    this.system = textInput(questions.system, { maxlength: 4000 });
    this.questions = h('textarea', { class: 'sy-input', rows: 6, dir: 'auto', 'data-testid': 'evaluate-questions' });
    this.questions.value = questions.questions.join('\n');
    this.answerTokens = numberInput(questions.max_tokens, { min: 1 });
    this.reference = select([], '');
    this.askBox = h('div', { class: 'sy-fields', hidden: true }, field('System prompt', this.system, '', true), field('Questions, one per line', this.questions), field('Tokens per answer', this.answerTokens), field('Ground truth', this.reference));
    this.tasks = textInput('', { placeholder: 'lambada_openai, arc_easy', testid: 'evaluate-tasks' });
    this.limit = numberInput('', { min: 1 });
    this.limit.placeholder = 'all';
    this.fetch = tick('Let it fetch the tasks’ data from the Hugging Face Hub', false);
    this.taskBox = h('div');
    this.title = textInput('', { placeholder: 'A name for this run (optional)', testid: 'evaluate-title' });
    this.title.setAttribute('aria-label', 'Name of this run');
    this.start = button('Start', () => this.#start(), true, 'evaluate-start');
    this.count = h('span', { class: 'sy-hint', 'data-testid': 'evaluate-count' });
    this.form.replaceChildren(
      h('h3', {}, 'Models and backends'), this.filter, this.models,
      h('h3', {}, 'Perplexity on'), this.textsBox,
      h('div', { class: 'sy-card-actions' }, fileButton('Add a text…', '.txt,.md,.jsonl,text/plain', (name, text) => this.#addText(name, text), 'evaluate-upload')),
      h('details', {}, h('summary', {}, 'How the text is cut'), h('div', { class: 'sy-fields' }, field('Context, tokens', this.context), field('Stride, tokens', this.stride), field('At most so many windows', this.most), this.windows)),
      h('h3', {}, 'Also measure'), h('div', { class: 'sy-ticks' }, this.speed, this.ask), this.askBox,
      h('details', {}, h('summary', {}, 'How speed is measured'), h('div', { class: 'sy-fields' }, field('Prompt, tokens', this.promptTokens), field('New tokens', this.newTokens), field('Repetitions', this.repetitions), field('Beams', this.beams, 'Numbers, separated by commas.'))),
      h('details', {}, h('summary', {}, 'Zero-shot tasks (lm-evaluation-harness)'), this.taskBox),
      h('div', { class: 'sy-card-actions sy-start' }, this.title, this.start, this.count),
    );
    this.#drawTexts();
    this.#drawTasks();
  }

  #drawModels() {
    if (!this.models) return;
    const words = this.filter.value.trim().toLowerCase();
    const focused = this.models.contains(document.activeElement) ? document.activeElement.dataset.key : null;
    this.filter.hidden = models.list.length < 9;
    const shown = models.list.filter((model) => model.format !== 'echo' && model.format !== 'lora' && model.id.toLowerCase().includes(words));
    this.models.replaceChildren(...(shown.length ? shown.map((model) => this.#modelRow(model)) : [h('p', { class: 'sy-hint' }, words ? 'No model is called so.' : 'No model is there yet.')]));
    if (focused) this.models.querySelector(`[data-key="${CSS.escape(focused)}"]`)?.focus();
    this.#chosenChanged();
  }

  #modelRow(model) {
    const loaders = (model.loaders || []).filter((loader) => loader.ok);
    const why = (model.loaders || []).find((loader) => !loader.ok)?.reason;
    return h('div', { class: 'sy-pick-row', 'data-testid': 'evaluate-model', 'data-model': model.id },
      h('span', { class: 'sy-pick-name', dir: 'auto' }, model.id, model.quantization?.method ? h('small', {}, ` ${[model.quantization.method.toUpperCase(), model.quantization.bits ? `${Number(model.quantization.bits.toFixed(1))} bit` : null, model.quantization.group_size > 0 ? `g${model.quantization.group_size}` : null].filter(Boolean).join(' ')}`) : ''),
      h('span', { class: 'sy-pick-loaders' }, loaders.length ? loaders.map((loader) => this.#loaderTick(model, loader)) : h('small', { class: 'sy-hint' }, model.problem || why || 'No backend can take it.')),
    );
  }

  #loaderTick(model, loader) {
    const key = `${model.id}\n${loader.name}`;
    const input = h('input', { type: 'checkbox', 'data-key': key, 'aria-label': `${model.id} through ${loader.title}`, onchange: () => {
      if (input.checked) this.chosen.set(key, { model: model.id, loader: loader.name });
      else this.chosen.delete(key);
      this.#chosenChanged();
    } });
    input.checked = this.chosen.has(key);
    return h('label', { class: 'sy-chip-tick' }, input, h('span', {}, loader.title));
  }

  #chosenChanged() {
    const targets = [...this.chosen.values()];
    this.count.textContent = targets.length ? plural(targets.length, 'row') : 'Choose at least one model.';
    this.start.disabled = !targets.length;
    const before = this.reference.value;
    const titles = (name) => models.loaders.find((loader) => loader.name === name)?.title || name;
    this.reference.replaceChildren(h('option', { value: '' }, 'The first in float32'), ...targets.map((target, at) => h('option', { value: String(at) }, `${target.model} through ${titles(target.loader)}`)));
    this.reference.value = [...this.reference.options].some((option) => option.value === before) ? before : '';
  }

  #drawTexts() {
    this.textsBox.replaceChildren(...this.data.data.map((entry) => tick(entry.title, this.texts.has(entry.name), {
      disabled: !entry.there, testid: `evaluate-text-${entry.name}`, note: entry.there ? '' : `Not here. Put ${entry.fetch} into ${this.data.folder}.`,
      onchange: (event) => (event.target.checked ? this.texts.add(entry.name) : this.texts.delete(entry.name)),
    })));
  }

  #drawTasks() {
    const missing = this.data.harness;
    const install = button('Install lm-evaluation-harness', () => post('evaluations/install').then(() => toast('Installing lm-evaluation-harness in the background.')).catch(fail));
    this.tasks.disabled = Boolean(missing);
    this.taskBox.replaceChildren(
      missing ? h('div', {}, h('p', { class: 'sy-card-reason' }, `${missing}.`), h('div', { class: 'sy-card-actions' }, install)) : '',
      h('div', { class: 'sy-fields' }, field('Tasks', this.tasks, 'Names, separated by commas.'), field('At most so many documents', this.limit), this.fetch),
    );
  }

  #askChanged() {
    this.askBox.hidden = !this.ask.input.checked;
  }

  async #addText(name, text) {
    try {
      const kept = /\.(txt|md|jsonl)$/i.test(name) ? name.replace(/\.\w+$/, (end) => end.toLowerCase()) : `${name}.txt`;
      this.data.data = (await put(`datasets/${encodeURIComponent(kept)}`, { text })).data;
      this.texts.add(kept);
      this.#drawTexts();
      toast(`${kept} is added.`, { level: 'success' });
    } catch (error) {
      fail(error);
    }
  }

  #plan() {
    const number = (input) => (input.value.trim() === '' ? 0 : Number(input.value));
    const tasks = this.tasks.value.split(',').map((name) => name.trim()).filter(Boolean);
    const plan = {
      targets: [...this.chosen.values()], data: this.data.data.filter((entry) => entry.there && this.texts.has(entry.name)).map((entry) => entry.name),
      context: number(this.context), stride: number(this.stride), max_windows: number(this.most), windows: this.windows.value, title: this.title.value.trim(),
    };
    if (this.speed.input.checked) {
      const beams = this.beams.value.split(',').map((part) => Number(part)).filter((value) => value > 0);
      plan.speed = { prompt_tokens: number(this.promptTokens), new_tokens: number(this.newTokens), repetitions: number(this.repetitions), beams };
    }
    if (this.ask.input.checked) {
      const lines = this.questions.value.split('\n').map((line) => line.trim()).filter(Boolean);
      plan.questions = { questions: lines, system: this.system.value, max_tokens: number(this.answerTokens), reference: this.reference.value === '' ? null : Number(this.reference.value) };
    }
    if (tasks.length) plan.tasks = { tasks, limit: number(this.limit), fetch: this.fetch.input.checked };
    return plan;
  }

  async #start() {
    this.start.disabled = true;
    try {
      const { id } = await post('evaluations', this.#plan());
      this.results.open([id]);
      await this.refresh();
      this.live.scrollIntoView({ block: 'nearest' });
    } catch (error) {
      fail(error);
    } finally {
      this.start.disabled = !this.chosen.size;
    }
  }

  // --- the run at work ---

  #heard(event) {
    const over = event.state !== 'running' && event.state !== 'queued';
    this.#drawLive(over ? null : event);
    if (over) {
      this.results.changed(event.id);
      this.refresh();
    } else if (event.stage !== this.stage || event.row !== this.row) {
      this.stage = event.stage;
      this.row = event.row;
      this.results.changed(event.id);
    }
  }

  #drawLive(event) {
    if (!event) {
      this.live.replaceChildren();
      delete this.live.dataset.key;
      return;
    }
    const stage = event.stage?.startsWith('text:') ? event.stage.slice(5) : STAGES[event.stage] || '';
    const words = [event.rows > 1 ? `${event.row + 1} of ${event.rows}` : null, event.label, stage, event.words].filter(Boolean).join(' · ');
    const key = `${event.id}:${event.state}`;
    if (this.live.dataset.key !== key) {
      this.live.dataset.key = key;
      this.meter = progressBar(event.fraction, 'Evaluating');
      this.words = h('p', { class: 'sy-hint', dir: 'auto' });
      this.live.replaceChildren(h('div', { class: 'sy-card sy-live', 'data-testid': 'evaluate-progress' }, h('strong', {}, event.state === 'queued' ? 'Waiting' : 'Evaluating'), this.meter, this.words,
        button('Stop', () => post(`evaluations/${event.id}/cancel`).catch(fail), false, 'evaluate-cancel')));
    }
    if (!this.live.firstChild) return;
    this.meter.value = event.fraction;
    this.words.textContent = words;
  }
}

/** Called by Gradio when the component is on the page. */
export function mount({ element }) {
  const root = element.querySelector('.sy-evaluate');
  if (root.dataset.mounted) return;
  root.dataset.mounted = '1';
  root.classList.add('sy-models', 'sy-tool');
  new EvaluatePage(root);
}
