// Results of evaluations: the list of runs, one table of the chosen ones, plots, exports, answers side by side.

import { del, get, post, url } from './api.js';
import { confirmDialog } from './dialog.js';
import { ago, h } from './dom.js';
import { button, svgOf } from './form.js';
import { Answers } from './answers.js';
import { fail } from './toast.js';

const STATES = { running: 'Running', done: 'Done', partial: 'With errors', cancelled: 'Stopped', interrupted: 'Interrupted', damaged: 'Damaged' };
const LAMPS = { running: 'loading', done: 'ready', partial: 'failed', damaged: 'failed' };

export class Results {
  /** `onOpen(ids)` hears what is shown, `onChange()` that the list has changed. */
  constructor(onOpen, onChange) {
    this.onOpen = onOpen;
    this.onChange = onChange;
    this.shown = [];
    this.runs = [];
    this.body = h('section', { 'aria-label': 'Results', 'data-testid': 'evaluate-results' });
    this.past = h('ul', { class: 'sy-runs', 'data-testid': 'evaluate-runs' });
    this.compareButton = button('Compare', () => this.open(this.#ticked()), true, 'evaluate-compare');
    this.element = h('div', {}, this.body, h('div', { class: 'sy-page-head' }, h('h2', {}, 'Past runs'), this.compareButton), this.past);
    this.#compareState();
  }

  list(runs) {
    this.runs = runs;
    const ticked = new Set(this.#ticked());
    this.past.replaceChildren(...(runs.length ? runs.map((run) => this.#runRow(run, ticked.has(run.id))) : [h('li', { class: 'sy-hint' }, 'No evaluation yet.')]));
    this.#compareState();
  }

  #ticked() {
    return [...this.past.querySelectorAll('input:checked')].map((input) => input.value);
  }

  #compareState() {
    const count = this.#ticked().length;
    this.compareButton.disabled = count < 2;
    this.compareButton.textContent = count < 2 ? 'Compare' : `Compare ${count} runs`;
  }

  #runRow(run, checked) {
    const what = run.title || run.models.slice(0, 3).join(', ') + (run.models.length > 3 ? ` and ${run.models.length - 3} more` : '');
    const input = h('input', { type: 'checkbox', value: run.id, 'aria-label': `Compare ${what}`, onchange: () => this.#compareState(), disabled: run.state === 'damaged' });
    input.checked = checked;
    const open = h('button', { type: 'button', class: 'sy-run-name', dir: 'auto', onclick: () => this.open([run.id], true), 'data-testid': 'evaluate-run', disabled: run.state === 'damaged', 'aria-current': this.shown.includes(run.id) ? 'true' : null }, what);
    return h('li', { class: 'sy-state', 'data-state': LAMPS[run.state] || 'empty', 'data-run': run.id },
      h('label', { class: 'sy-run-tick' }, input), h('span', { class: 'sy-lamp' }), open, h('span', { class: 'sy-badge' }, STATES[run.state] || run.state), h('span', { class: 'sy-hint' }, run.created ? ago(run.created) : run.problem));
  }

  /** Show one run, or several in one table. */
  async open(ids, scroll = false) {
    this.shown = ids;
    this.onOpen(ids);
    for (const node of this.past.querySelectorAll('[data-testid=evaluate-run]')) {
      if (ids.includes(node.closest('li').dataset.run)) node.setAttribute('aria-current', 'true');
      else node.removeAttribute('aria-current');
    }
    await this.#draw();
    if (scroll) this.body.scrollIntoView({ block: 'start' });
  }

  /** A run has moved on: read it again if it is shown. */
  changed(id) {
    if (!this.shown.includes(id)) return;
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.#draw(), 400);
  }

  async #draw() {
    const ids = [...this.shown];
    if (!ids.length) return this.body.replaceChildren();
    try {
      const data = ids.length === 1 ? await get(`evaluations/${ids[0]}`) : await get(`evaluations/compare?ids=${ids.map(encodeURIComponent).join(',')}`);
      if (ids.join() !== this.shown.join()) return null;
      this.body.replaceChildren(...this.#parts(ids, data));
    } catch (error) {
      if (error.code === 'not_found') this.body.replaceChildren();
      else if (error.code !== 'offline') fail(error);
    }
    return null;
  }

  #parts(ids, data) {
    const { run } = data;
    const title = run ? run.title || 'Result' : `${ids.length} runs compared`;
    const errors = data.table.rows.flatMap((row) => row.errors.map((error) => h('li', {}, h('strong', { dir: 'auto' }, row.label), `, ${error.stage.replace('text:', '')}: ${[error.message, error.hint].filter(Boolean).join(' ')}`)));
    return [
      h('div', { class: 'sy-page-head sy-result-head' }, h('h2', { dir: 'auto' }, title), this.#actions(ids, data)),
      table(data.table),
      errors.length ? h('ul', { class: 'sy-card-error sy-result-errors', 'data-testid': 'evaluate-errors' }, errors) : '',
      data.same_machine ? '' : h('p', { class: 'sy-card-reason' }, 'These runs were taken on different machines: compare perplexities, not speeds.'),
      h('div', { class: 'sy-plots', 'data-testid': 'evaluate-plots' }, Object.values(data.plots).map((svg) => h('figure', {}, svgOf(svg)))),
      run ? new Answers(run).element : '',
      h('details', { class: 'sy-conditions' }, h('summary', {}, 'How and on what it was measured'), data.conditions.map((lines) => h('ul', {}, lines.map((line) => h('li', {}, line))))),
    ];
  }

  #actions(ids, data) {
    const save = (format, words) => h('a', { class: 'sy-button', href: url(`ui-api/evaluations/export?ids=${ids.map(encodeURIComponent).join(',')}&format=${format}`), download: '', 'data-testid': `export-${format}` }, words);
    const { run, active } = data;
    const unfinished = run && !active && run.state !== 'done';
    return h('div', { class: 'sy-card-actions' },
      unfinished ? button('Go on with it', () => post(`evaluations/${run.id}/resume`).then(this.onChange).catch(fail), true, 'evaluate-resume') : '',
      save('markdown', 'Markdown'), save('csv', 'CSV'), save('json', 'JSON'),
      run && !active ? button('Delete', () => this.#delete(run.id), false, 'evaluate-delete') : '',
    );
  }

  async #delete(id) {
    if (!(await confirmDialog('Delete this evaluation?', 'Its figures are gone then.', 'Delete'))) return;
    try {
      await del(`evaluations/${id}`);
      this.shown = [];
      this.body.replaceChildren();
      this.onOpen([]);
      this.onChange();
    } catch (error) {
      fail(error);
    }
  }
}

const format = (value, digits) => (typeof value === 'number' ? value.toLocaleString('en', { minimumFractionDigits: digits ?? 0, maximumFractionDigits: digits ?? 3 }) : value);

/** The best value of each measured column, where there is more than one. */
function bests(columns, rows) {
  const found = {};
  for (const { key, better } of columns) {
    const values = rows.map((row) => row[key]).filter((value) => typeof value === 'number');
    if (better && values.length > 1 && new Set(values).size > 1) found[key] = better === 'low' ? Math.min(...values) : Math.max(...values);
  }
  return found;
}

function table({ columns, rows }) {
  const best = bests(columns, rows);
  const cell = (row, { key, digits }) => {
    const value = row[key];
    const spread = row[`${key}_sd`];
    const text = value === null || value === undefined ? '' : format(value, digits);
    const classes = [digits === null ? '' : 'sy-number', value !== null && value === best[key] ? 'sy-best' : ''].join(' ').trim();
    return h('td', { class: classes, dir: 'auto', title: classes.includes('sy-best') ? 'The best of this column' : null }, text, text && spread ? h('small', {}, ` ± ${format(spread, digits)}`) : '');
  };
  const waiting = { waiting: 'waiting', failed: 'failed', missing: 'not measured' };
  return h('div', { class: 'sy-table-scroll', tabindex: '0', role: 'region', 'aria-label': 'Table of results' }, h('table', { class: 'sy-table', 'data-testid': 'evaluate-table' },
    h('thead', {}, h('tr', {}, columns.map(({ title, digits }) => h('th', { scope: 'col', class: digits === null ? '' : 'sy-number' }, title)))),
    h('tbody', {}, rows.map((row) => h('tr', { 'data-state': row.state }, columns.map((column, at) => {
      if (at) return cell(row, column);
      return h('th', { scope: 'row', dir: 'auto' }, format(row[column.key], column.digits), waiting[row.state] ? h('span', { class: 'sy-badge' }, waiting[row.state]) : '');
    })))),
  ));
}
